"""Causal attention of queries at the last positions of the keys, against all scores in float64."""

import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.models.ops.causal_attention import allowed_keys, attend_at_end, attend_on_gpu

BATCH, SIZE = 2, 16
LENGTHS = {
    "a later chunk": (16, 48),
    "odd sizes": (5, 7),
    "several blocks": (64, 700),
    "the first chunk": (16, 16),
}
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def _inputs(queries: int, keys: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, and keys and values joined as a gathered tensor is; [s, b, n, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, BATCH, 8, SIZE), (keys, BATCH, groups, 2 * SIZE)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _with_gradients(attend: Any, query: torch.Tensor, joined: torch.Tensor) -> list[torch.Tensor]:
    output = attend(query.permute(1, 2, 0, 3), *joined.permute(1, 2, 0, 3).split(SIZE, dim=-1))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), (query, joined))]


def _materialized(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    repeats = query.size(1) // key.size(1)
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    forbidden = torch.ones(query.size(2), key.size(2)).triu(1 + key.size(2) - query.size(2)).bool()
    return (query @ key.mT * scale).masked_fill(forbidden, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_and_gradients_are_those_of_all_scores_in_float64(
    lengths: str, dtype: torch.dtype, groups: int, scale: float | None
) -> None:
    inputs = _inputs(*LENGTHS[lengths], groups, dtype)
    found = _with_gradients(lambda *tensors: attend_at_end(*tensors, scale=scale), *inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = _with_gradients(lambda q, k, v: _materialized(q, k, v, scale or SIZE**-0.5), *exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.linalg.norm(ours.double() - theirs) <= TOLERANCES[dtype] * torch.linalg.norm(theirs)


class _LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.size = max(self.size, each.numel())
        return result


def test_neither_scores_nor_a_mask_are_built_in_forward_or_backward() -> None:
    query, joined = _inputs(512, 2048, 2, torch.float32)
    with _LargestTensor() as largest:
        _with_gradients(attend_at_end, query, joined)
    assert largest.size <= joined.numel() < 512 * 2048


def test_the_path_of_gpus_is_the_same_attention() -> None:
    # Without a GPU torch has no fused kernel for it: it warns, and builds the mask.
    query, joined = _inputs(6, 10, 2, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = _with_gradients(
            lambda *tensors: attend_on_gpu(*tensors, dropout=0.0, scale=None), query, joined
        )
    expected = _with_gradients(lambda q, k, v: _materialized(q, k, v, SIZE**-0.5), query, joined)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_on_the_cpu_drops_weights_and_keeps_the_mask() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 4, SIZE), torch.randn(1, 1, 8, SIZE)
    value = torch.eye(8).view(1, 1, 8, 8)  # so the output is the attention's weights
    weights = attend_at_end(query, key, value, dropout=0.5)[0, 0]
    allowed = allowed_keys(4, 8, query.device)
    assert not weights[~allowed].any()
    assert 0 < int((weights[allowed] == 0).sum()) < int(allowed.sum())
