"""SDPAttention equals materialised attention in float64, and megatron-core's local attention."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.engine_config import build_transformer_config
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY

HEADS, SIZE, BATCH = 4, 8, 2
SHAPES = {
    # queries, keys, key/value heads, what is asked for
    "causal": (7, 7, 4, AttnMaskType.causal, "lower"),
    "causal with grouped queries": (7, 7, 2, AttnMaskType.causal, "lower"),
    "causal with one key head": (7, 7, 1, AttnMaskType.causal, "lower"),
    "bidirectional": (7, 7, 2, AttnMaskType.no_mask, "all"),
    "explicit mask": (7, 7, 2, AttnMaskType.arbitrary, "mask"),
    "explicit mask in a causal layer": (7, 7, 2, AttnMaskType.causal, "mask"),
    "one query after a cache": (1, 7, 2, AttnMaskType.no_mask, "lower"),
    "three queries after a cache": (3, 7, 2, AttnMaskType.no_mask, "lower"),
    "first query of all": (1, 1, 2, AttnMaskType.causal, "lower"),
}


def attention(kind: AttnMaskType, scale: float | None = None) -> SDPAttention:
    """The module under test, without dropout."""
    config: Any = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    return SDPAttention(config, 1, kind, "self", softmax_scale=scale)


def inputs(queries: int, keys: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random query, key, value, output gradient."""
    generator = torch.Generator().manual_seed(0)
    keys_and_values = (keys, BATCH, groups, SIZE)
    shapes = [(queries, BATCH, HEADS, SIZE), keys_and_values, keys_and_values, (queries, BATCH, HEADS * SIZE)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def forbidden(queries: int, keys: int, what: str) -> torch.Tensor:
    """[b, 1, s_q, s_k], True where attention is forbidden; queries are the last positions."""
    position = torch.arange(keys - queries, keys).unsqueeze(1)
    above = torch.arange(keys).unsqueeze(0) > position
    if what == "lower":
        return above.expand(BATCH, 1, queries, keys)
    if what == "all":
        return torch.zeros(BATCH, 1, queries, keys, dtype=torch.bool)
    # Two documents in the first sequence, a prefix in the second.
    mask = above.expand(BATCH, 1, queries, keys).clone()
    mask[0, :, 4:, :4] = True
    mask[1, :, :3, :3] = False
    return mask


def materialised(tensors: list[torch.Tensor], mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k^T * scale) v of [q, k, v], written out with all scores."""
    query, key, value = tensors
    repeat = query.size(2) // key.size(2)
    key, value = (tensor.repeat_interleave(repeat, dim=2) for tensor in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    probabilities = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", probabilities, value).flatten(2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("case", SHAPES)
def test_attention_and_its_gradients_equal_materialised_float64(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    queries, keys, groups, kind, what = SHAPES[case]
    *tensors, grad = inputs(queries, keys, groups, dtype)
    mask = forbidden(queries, keys, what)
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()

    output = attention(kind)(*tensors, mask if what == "mask" else None)
    output.backward(grad)
    expected = materialised(exact, mask, 1 / math.sqrt(SIZE))
    expected.backward(grad.double())

    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    for found, wanted in zip(tensors, exact, strict=True):
        assert found.grad is not None and wanted.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=0, atol=3 * tolerance)


def test_given_scale_replaces_the_usual_one() -> None:
    *tensors, _ = inputs(7, 7, 2, torch.float32)
    output = attention(AttnMaskType.causal, scale=0.05)(*tensors, None)
    expected = materialised([t.double() for t in tensors], forbidden(7, 7, "lower"), 0.05)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)


def test_mask_type_of_the_call_comes_before_the_layers_own() -> None:
    *tensors, _ = inputs(7, 7, 2, torch.float32)
    bidirectional = attention(AttnMaskType.no_mask)(*tensors, None)
    called = attention(AttnMaskType.causal)(*tensors, None, attn_mask_type=AttnMaskType.no_mask)
    assert torch.equal(called, bidirectional)


def test_attention_and_its_gradients_equal_megatron_cores_local_one() -> None:
    for case, (difference, scale) in run_single(_against_local).items():
        assert difference <= 2e-6 * scale, case


def _against_local() -> dict[str, tuple[float, float]]:
    parallel = ParallelConfig()
    initialize(parallel, seed=1)
    config = build_transformer_config(TINY, parallel)
    found = {}
    for case in ("causal", "bidirectional", "explicit mask"):
        queries, keys, _, kind, what = SHAPES[case]
        groups = TINY.resolved_num_query_groups
        *tensors, grad = inputs(queries, keys, groups, torch.float32)
        mask = forbidden(queries, keys, what) if what == "mask" else None
        gradients = []
        for build in (SDPAttention, DotProductAttention):
            module = build(config, layer_number=1, attn_mask_type=kind, attention_type="self")
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            output = module(*leaves, mask)
            output.backward(grad)
            gradients.append([output.detach(), *(leaf.grad for leaf in leaves)])
        pairs = list(zip(*gradients, strict=True))
        found[case] = (
            max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
            max(float(theirs.abs().max()) for _, theirs in pairs),
        )
    return found
