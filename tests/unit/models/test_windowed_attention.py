"""Attention within a sliding window, in blocks, against all scores in float64; and the memory that it takes."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.models.ops.windowed_attention import attend_in_window
from tests.unit.models.test_attention import attention, forbidden, materialised
from tests.unit.models.test_causal_attention import TOLERANCES, _inputs, _LargestTensor, _with_gradients

LENGTHS = {
    # queries, keys, window
    "window of one block": (300, 300, 16),
    "window of several blocks": (1500, 1500, 1200),
    "the token itself only": (70, 70, 1),
    "one token less than the sequence": (70, 70, 69),
    "window of the whole sequence": (70, 70, 70),
    "queries after a cache": (7, 300, 64),
    "queries on both sides of the window's end": (50, 60, 55),
    "one query after a cache": (1, 90, 17),
}
SCALE = 0.3


def _all_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    repeats = query.size(1) // key.size(1)
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    distance = torch.arange(key.size(2) - query.size(2), key.size(2)).unsqueeze(1) - torch.arange(key.size(2))
    scores = (query @ key.mT * SCALE).masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_and_gradients_are_those_of_all_scores_in_float64(
    lengths: str, dtype: torch.dtype, groups: int
) -> None:
    queries, keys, window = LENGTHS[lengths]
    inputs = _inputs(queries, keys, groups, dtype)
    found = _with_gradients(lambda q, k, v: attend_in_window(q, k, v, window, scale=SCALE), *inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = _with_gradients(lambda q, k, v: _all_scores(q, k, v, window), *exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        # With a window of one token, the queries have no gradient: compare with the size of the output.
        scale = torch.linalg.norm(expected[0] if not theirs.any() else theirs)
        assert torch.linalg.norm(ours.double() - theirs) <= 2 * TOLERANCES[dtype] * scale


def test_no_tensor_is_larger_than_the_keys_and_values_in_forward_or_backward() -> None:
    query, joined = _inputs(2048, 2048, 8, torch.float32)
    with _LargestTensor() as largest:
        _with_gradients(lambda q, k, v: attend_in_window(q, k, v, 100), query, joined)
    assert largest.size <= joined.numel() < 2048 * 2048


def test_dropout_is_applied_within_the_window() -> None:
    query, joined = _inputs(300, 300, 2, torch.float64)
    torch.manual_seed(5)
    key, value = joined.permute(1, 2, 0, 3).split(16, dim=-1)
    kept: Any = [
        attend_in_window(query.permute(1, 2, 0, 3), key, value, 32, dropout=rate) for rate in (0.0, 0.5)
    ]
    assert not torch.equal(*kept)
    # The first token attends to itself only: its weight of 1 is dropped, or doubled.
    first = kept[1][:, :, 0] / kept[0][:, :, 0]
    assert {0.0, 2.0} == set(first.round(decimals=6).unique().tolist())


@pytest.mark.parametrize("case", ["causal", "explicit mask in a causal layer", "queries after a cache"])
def test_the_layers_attention_adds_its_window_to_every_kind_of_mask(case: str) -> None:
    queries = 3 if case == "queries after a cache" else 7
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, 2, heads, 8, generator=generator, dtype=torch.float64)
        for size, heads in ((queries, 4), (7, 2), (7, 2))
    ]
    what = "mask" if case == "explicit mask in a causal layer" else "lower"
    mask = forbidden(queries, 7, what)
    module = attention(AttnMaskType.causal)
    module.window = 3
    kind = AttnMaskType.no_mask if case == "queries after a cache" else None
    output = module(*tensors, mask if what == "mask" else None, attn_mask_type=kind)
    position = torch.arange(7 - queries, 7).unsqueeze(1)
    expected = materialised(tensors, mask | (position - torch.arange(7) >= 3), 8**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
