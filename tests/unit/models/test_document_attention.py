"""Attention of documents to themselves, against all scores in float64 under megatron-core's own mask; and its memory.

Documents are given by tokens, of which 0 ends a document: megatron-core's dataset makes its mask of them.
"""

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_ext.models.ops.documents.document_attention import attend_to_documents
from megatron_ext.models.ops.documents.document_bounds import document_bounds, forbidden_pairs
from tests.unit.models.test_causal_attention import TOLERANCES, _LargestTensor, _with_gradients

EOD, LENGTH, HEADS, SIZE, SCALE = 0, 48, 8, 16, 0.3

ENDS: dict[str, list[list[int]]] = {
    "one document": [[], []],
    "rows with different documents": [[10, 30], [20]],
    "an end at the last position": [[LENGTH - 1], [5, LENGTH - 1]],
    "an end at the position before the last": [[LENGTH - 2], []],
    "two ends in a row": [[9, 10, 33], [0, 1, 2]],
    "every token ends a document": [list(range(LENGTH)), [7]],
}
"""Positions of the end-of-document tokens in each of two rows."""

KINDS = {
    # causal, window
    "causal": (True, None),
    "bidirectional": (False, None),
    "window of 1": (True, 1),
    "window of 7": (True, 7),
}


def _tokens(ends: list[list[int]]) -> torch.Tensor:
    tokens = torch.ones(len(ends), LENGTH, dtype=torch.int64)
    for row, places in enumerate(ends):
        tokens[row, places] = EOD
    return tokens


def _engines(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """megatron-core's mask [b, 1, s, s], True where attention is forbidden, and its position ids [b, s]."""
    made = [_get_ltor_masks_and_position_ids(row, EOD, True, True, False, True) for row in tokens]
    return torch.stack([mask for mask, _, _ in made]), torch.stack([ids for _, _, ids in made])


def _bounds(ends: list[list[int]]) -> torch.Tensor:
    return document_bounds(_engines(_tokens(ends))[1] == 0)


def _mask(ends: list[list[int]], causal: bool, window: int | None) -> torch.Tensor:
    mask = _engines(_tokens(ends))[0]
    if not causal:
        return mask & mask.transpose(-1, -2)
    far = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-(window or LENGTH))
    return mask | far


def _inputs(groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (LENGTH, 2, HEADS, SIZE), (LENGTH, 2, groups, 2 * SIZE)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _all_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, forbidden: torch.Tensor
) -> torch.Tensor:
    repeats = query.size(1) // key.size(1)
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    return (query @ key.mT * SCALE).masked_fill(forbidden, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ENDS)
def test_attention_and_gradients_are_those_under_megatron_cores_mask(
    ends: str, kind: str, dtype: torch.dtype, groups: int
) -> None:
    causal, window = KINDS[kind]
    inputs, bounds = _inputs(groups, dtype), _bounds(ENDS[ends])
    found = _with_gradients(
        lambda q, k, v: attend_to_documents(q, k, v, bounds, causal=causal, window=window, scale=SCALE),
        *inputs,
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = _mask(ENDS[ends], causal, window)
    expected = _with_gradients(lambda q, k, v: _all_scores(q, k, v, mask), *exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        # A token that attends to itself only gives its query no gradient: compare with the size of the output.
        scale = torch.linalg.norm(expected[0] if not theirs.any() else theirs)
        assert torch.linalg.norm(ours.double() - theirs) <= 2 * TOLERANCES[dtype] * scale


@pytest.mark.parametrize("ends", ENDS)
def test_the_mask_for_attention_that_needs_one_is_megatron_cores(ends: str) -> None:
    bounds = _bounds(ENDS[ends])
    assert torch.equal(forbidden_pairs(bounds, LENGTH, causal=True), _mask(ENDS[ends], True, None))
    assert torch.equal(forbidden_pairs(bounds, LENGTH, causal=False), _mask(ENDS[ends], False, None))


def test_a_row_begins_a_document_even_where_its_positions_go_on() -> None:
    starts = torch.tensor([[False, False, True], [False, False, False]])
    assert document_bounds(starts).tolist() == [0, 2, 3, 6]
    assert not starts[:, 0].any()  # the batch is not changed


def test_no_tensor_is_larger_than_the_keys_and_values_in_forward_or_backward() -> None:
    length = 2048
    generator = torch.Generator().manual_seed(0)
    shapes = (length, 1, HEADS, SIZE), (length, 1, HEADS, 2 * SIZE)
    query, joined = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    bounds = torch.tensor([0, 700, 701, 1900, length], dtype=torch.int32)
    with _LargestTensor() as largest:
        _with_gradients(lambda q, k, v: attend_to_documents(q, k, v, bounds), query, joined)
    assert largest.size <= joined.numel() < length * length


def test_dropout_does_not_cross_documents() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 1, LENGTH, SIZE), torch.randn(2, 1, LENGTH, SIZE)
    value = torch.eye(LENGTH).expand(2, 1, LENGTH, LENGTH)  # so the output is the attention's weights
    ends = ENDS["rows with different documents"]
    weights = attend_to_documents(query, key, value, _bounds(ends), dropout=0.5)
    forbidden = _mask(ends, True, None)
    assert not weights[forbidden].any()
    assert 0 < int((weights[~forbidden] == 0).sum()) < int((~forbidden).sum())
