"""Context parallelism: how sequences are divided, and attention over the ranks' keys against all scores in float64."""

import functools
import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.activation_memory import layer_activation_bytes
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.context_parallel import gather_sequence, part_of_batch
from megatron_ext.models.ops.documents.document_bounds import document_bounds, packed_documents
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.training.frozen_forward import ids_of_parts
from tests.unit.models.test_memory_estimate import MODEL, layout_of, saved_bytes

LENGTH, BATCH, HEADS, SIZE = 32, 2, 4, 8
KINDS = {
    "causal": (AttnMaskType.causal, ""),
    "bidirectional": (AttnMaskType.no_mask, ""),
    "mask of documents": (AttnMaskType.causal, "mask"),
    "bounds of documents": (AttnMaskType.causal, "bounds"),
    "bounds of documents, bidirectional": (AttnMaskType.no_mask, "bounds"),
}
CASES: dict[str, tuple[AttnMaskType, str, int, int | None]] = {
    f"{kind}, {groups} key heads": (*KINDS[kind], groups, None) for kind in KINDS for groups in (4, 2, 1)
}
CASES |= {
    f"{kind}, window of {window}": (*KINDS[kind], 2, window)
    for kind in ("causal", "mask of documents", "bounds of documents")
    for window in (1, 5, 20)
}

# Later versions of megatron-core ask whether its hybrid context parallelism divides the batch.
_ASKS = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
_ENGINES_OPTIONS: dict[str, Any] = {"is_hybrid_cp": False} if _ASKS else {}


@dataclass
class Found:
    """What one rank computes; sequences are joined by the test."""

    places: torch.Tensor
    """Positions of this rank's tokens, [s / C]."""

    fields: dict[str, torch.Tensor]
    engine_fields: dict[str, torch.Tensor]
    """This rank's part of a batch; and the part that megatron-core takes."""

    whole: torch.Tensor
    part_gradient: torch.Tensor
    attention: dict[str, list[torch.Tensor]]
    """Output and gradients of query, key and value, each [s / C, ...], by case."""

    ids: list[bytes]
    error: str


def _group() -> Any:
    return parallel_state.get_context_parallel_group()


def _batch(length: int = LENGTH) -> dict[str, torch.Tensor]:
    tokens = torch.arange(BATCH * length).view(BATCH, length)
    return {
        "tokens": tokens,
        "loss_mask": tokens.float() / 7,
        "position_ids": torch.arange(length).expand(BATCH, length),
        "attention_mask": torch.rand(BATCH, 1, length, length, generator=_seeded(3)) > 0.5,
    }


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tensors(groups: int) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient of whole sequences, in float64."""
    shapes = [(HEADS, SIZE), (groups, SIZE), (groups, SIZE), (HEADS * SIZE,)]
    generator = _seeded(0)
    return [torch.randn(LENGTH, BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _starts() -> torch.Tensor:
    """[b, s], True where documents begin: inside of a chunk and at its first token, of one token, of the last one."""
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, [8, 11, 12]] = True
    starts[1, [20, 31]] = True
    return starts


def _document_mask() -> torch.Tensor:
    """[b, 1, s, s], True where attention is forbidden: causal, and sequences of several documents."""
    document = _starts().cumsum(1)
    later = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return (later | (document.unsqueeze(2) != document.unsqueeze(1))).unsqueeze(1)


def _attend(
    places: torch.Tensor, kind: AttnMaskType, documents: str, groups: int, window: int | None
) -> list[torch.Tensor]:
    config: Any = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    groups_of_rank: Any = SimpleNamespace(cp=_group())
    attention = SDPAttention(config, 1, kind, "self", pg_collection=groups_of_rank, window=window)
    query, key, value, gradient = (tensor[places].clone().requires_grad_() for tensor in _tensors(groups))
    mask = _document_mask()[:, :, places] if documents == "mask" else None
    packed = packed_documents(document_bounds(_starts()), LENGTH) if documents == "bounds" else None
    output = attention(query, key, value, mask, packed_seq_params=packed)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), gradient.detach())]


def _found(parallel: ParallelConfig) -> Found:
    initialize(parallel, seed=1)
    batch, group = _batch(), _group()
    fields = part_of_batch(batch | {"time_step": torch.tensor([5, 6])}, group)
    places = fields["position_ids"][0]
    part = torch.arange(LENGTH, dtype=torch.float64)[places].view(-1, 1).requires_grad_()
    whole = gather_sequence(part, group)
    # Every rank's loss weighs the whole sequence by position and rank.
    (whole[:, 0] * torch.arange(LENGTH) * (group.rank() + 1)).sum().backward()
    assert part.grad is not None
    try:
        part_of_batch(_batch(LENGTH + 2), group)
        error = ""
    except ValueError as caught:
        error = str(caught)
    return Found(
        places,
        fields,
        get_batch_on_this_cp_rank(dict(batch), **_ENGINES_OPTIONS),
        whole.detach()[:, 0],
        part.grad[:, 0],
        {name: _attend(places, *case) for name, case in CASES.items()},
        # Of two sequences only rank 0's part differs, of the other two no part does.
        ids_of_parts(
            [b"first", b"other" if group.rank() == 0 else b"first", b"third", b"third"], torch.device("cpu")
        ),
        error,
    )


@functools.cache
def _ranks(size: int) -> list[Found]:
    return run_distributed(_found, size, ParallelConfig(context_parallel_size=size))


SAVED = {
    "rotary positions": MODEL,
    "no positions": replace(MODEL, position_embedding_type="none"),
    "norm on queries and keys": replace(MODEL, qk_layernorm=True),
}


def _saved_by_a_layer(parallel: ParallelConfig) -> dict[str, float]:
    initialize(parallel, seed=1)
    return {
        name: saved_bytes(model, parallel, True) - saved_bytes(replace(model, num_layers=3), parallel, True)
        for name, model in SAVED.items()
    }


def test_activations_of_a_layer_are_what_autograd_keeps() -> None:
    parallel = ParallelConfig(context_parallel_size=2)
    for found in run_distributed(_saved_by_a_layer, 2, parallel):
        for name, model in SAVED.items():
            estimate = layer_activation_bytes(layout_of(model, parallel, precision="bf16"))
            assert estimate == pytest.approx(found[name], rel=0.07), name


SIZES = pytest.mark.parametrize("size", [2, 4])


@SIZES
def test_every_field_is_sliced_as_megatron_core_slices_it_and_one_value_per_sequence_stays(size: int) -> None:
    for found in _ranks(size):
        assert found.fields.keys() == {*found.engine_fields, "time_step"}
        for name, part in found.engine_fields.items():
            assert torch.equal(found.fields[name], part), name
        assert found.fields["time_step"].tolist() == [5, 6]
        assert found.fields["tokens"].shape == (BATCH, LENGTH // size)


@SIZES
def test_gathered_sequences_are_in_order_and_their_gradients_are_summed_over_the_ranks(size: int) -> None:
    for found in _ranks(size):
        assert found.whole.tolist() == list(range(LENGTH))
        factor = size * (size + 1) // 2
        assert found.part_gradient.tolist() == (found.places * factor).tolist()


def _expected(kind: AttnMaskType, documents: str, groups: int, window: int | None) -> list[torch.Tensor]:
    """The same of whole sequences, with all scores."""
    query, key, value, gradient = (tensor.requires_grad_() for tensor in _tensors(groups))
    forbidden = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    if documents:
        forbidden = _document_mask()
        forbidden = forbidden if kind is AttnMaskType.causal else forbidden & forbidden.mT
    elif kind is AttnMaskType.causal:
        forbidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    if window is not None:
        forbidden = forbidden | torch.ones(LENGTH, LENGTH).tril(-window).bool()
    keys, values = (each.repeat_interleave(HEADS // groups, 2) for each in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, keys) * SIZE**-0.5
    weights = scores.masked_fill(forbidden, float("-inf")).softmax(-1)
    output = torch.einsum("bnqk,kbnd->qbnd", weights, values).flatten(2)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), gradient.detach())]


@SIZES
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_those_of_all_scores_in_float64(case: str, size: int) -> None:
    for number, expected in enumerate(_expected(*CASES[case])):
        joined = torch.full_like(expected, float("nan"))
        for found in _ranks(size):
            joined[found.places] = found.attention[case][number]
        torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-13)


@SIZES
def test_the_id_of_a_part_differs_where_any_rank_s_part_differs_and_between_ranks(size: int) -> None:
    ids = [found.ids for found in _ranks(size)]
    for first, second, third, fourth in ids:
        assert first != second
        assert third == fourth
    assert len({third for _, _, third, _ in ids}) == size


@SIZES
def test_a_length_that_cannot_be_divided_is_one_line(size: int) -> None:
    expected = (
        f"a sequence of 34 tokens cannot be divided by --context-parallel-size {size}; its length must be divisible "
        f"by {2 * size}"
    )
    assert {found.error for found in _ranks(size)} == {expected}
