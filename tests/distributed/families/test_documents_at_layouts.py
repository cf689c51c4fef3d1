"""Documents packed into sequences: every family, at every layout, against each document alone in a sequence of its own.

megatron-core's dataset code says what the flags mean: where documents begin, which positions restart, which tokens
carry no loss. The references need none of its masks: a document is a sequence of its length, so nothing precedes it.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.models.build_model import build_model
from megatron_ext.models.model_extension import Extension
from megatron_ext.models.ops.documents.document_bounds import document_bounds
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.interface.family_interface import Batch, Family, auxiliary_inputs, make_batch
from tests.unit.progressive.progressive_helpers import DUAL, MakeAdapted

EOD = 0
ENDS = ([1, 4, 7, 8, 15], [5, 14])
"""Places of the end-of-document tokens in two kinds of sequences of 16 tokens: two in a row, on both sides of a rank's
border under sequence and context parallelism, inside of a rank's part, at the last position and the one before it."""


class _Documents(Family):
    """Gives a batch documents, as megatron-core's dataset does with the three flags."""

    name = "documents"

    def __init__(self, bidirectional: bool = False) -> None:
        self.bidirectional = bidirectional

    def extension(self) -> Extension:
        extension = Extension()
        extension.name, extension.reads_layers = self.name, False
        extension.bidirectional = self.bidirectional
        return extension

    def make_batch(self, batch: Batch) -> Batch:
        tokens = batch["tokens"].clone()
        tokens[tokens == EOD] = 1
        made = []
        for row in tokens:
            # Whatever the layout, a sequence has the same documents.
            row[ENDS[int(row[0]) % 2]] = EOD
            made.append(_get_ltor_masks_and_position_ids(row, EOD, True, True, True, False)[1:])
        loss_mask, positions = (torch.stack(field) for field in zip(*made, strict=True))
        labels = torch.cat([tokens[:, 1:], batch["labels"][:, -1:]], dim=1)
        return batch | {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": positions,
            DOCUMENT_STARTS: positions == 0,
        }


PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_strategy="identity", per_layer_hidden_size=8)
NPT = NPTModuleConfig(npt_layers="1,3", np_form="low_rank", np_rank=4, np_init_scale=0.5, freeze_base=False)
LEARNED = replace(TINY, position_embedding_type="learned_absolute", init_method_std=0.1)
WINDOWED = replace(TINY, window_size="4,0", window_attn_skip_freq="2", init_method_std=0.1)


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        found: list[Family] = []
        if self.variant == "PLE":
            found = [PerLayerFamily(PLE, VOCAB_SIZE)]
        if self.variant == "NPT":
            found = [NPTFamily(NPT)]
        if "rack" in self.variant:
            found = MakeAdapted(dict.fromkeys(range(4), DUAL))()
        return [*found, _Documents(bidirectional="bidirectional" in self.variant)]


MODELS = {
    "learned positions": LEARNED,
    "windows": WINDOWED,
    "AltUp and Laurel": replace(WINDOWED, altup_streams=3, laurel_rank=4),
    "PLE": replace(TINY, init_method_std=0.1),
    "NPT": replace(TINY, init_method_std=0.1),
    "bidirectional rack": replace(TINY, init_method_std=0.1),
}
RUNS = LayoutRuns(
    {name: Variant(make_families=_Make(name), model=model) for name, model in MODELS.items()},
    ["TP2+SP", "PP2 interleaved", "CP2", "TP1 recomputed"],
    {
        "TP2": ["learned positions"],
        "PP2": ["PLE"],
        "TP2+SP recomputed": ["windows"],
        "PP2 interleaved recomputed": ["NPT"],
        "TP2+SPxCP2": ["windows", "bidirectional rack"],
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_trains_on_documents_as_the_single_process_does(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant))


def _alone(batch: Batch) -> list[Batch]:
    """Returns each document of the batch as a batch of one sequence, with positions from 0."""
    found = []
    for row in range(len(batch["tokens"])):
        first = [*batch[DOCUMENT_STARTS][row].nonzero().flatten().tolist(), batch["tokens"].size(1)]
        for start, end in itertools.pairwise(first):
            names = ("tokens", "labels", "loss_mask")
            document = {name: batch[name][row : row + 1, start:end] for name in names}
            found.append(document | {"position_ids": torch.arange(end - start).unsqueeze(0)})
    return found


ALONE = MODELS | {
    "scores of megatron-core": replace(LEARNED, attention_backend="local"),
    "bidirectional scores of megatron-core": replace(LEARNED, attention_backend="local"),
}
"""With `--attention-backend local` the micro-batch gets a mask."""

Result = tuple[float, dict[str, torch.Tensor]]


def _passes(model: ModelConfig, families: list[Family], batches: list[Batch]) -> Result:
    """The sum of the losses over batches that may differ in length, and its gradients."""
    chunks = build_model(
        model,
        ParallelConfig(),
        vocab_size=VOCAB_SIZE,
        seed=1,
        extensions=[family.extension() for family in families],
    )
    for family in families:
        family.prepare_model(chunks)
    total = 0.0
    for batch in batches:
        marked = DOCUMENT_STARTS in batch
        losses = chunks[0](
            batch["tokens"],
            batch["position_ids"],
            None,
            auxiliary_inputs=auxiliary_inputs(families, batch),
            labels=batch["labels"],
            document_bounds=document_bounds(batch[DOCUMENT_STARTS]) if marked else None,
        )
        loss = (losses * batch["loss_mask"]).sum()
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in chunks[0].named_parameters() if p.grad is not None}


def _packed_and_alone(variant: str, model: ModelConfig) -> tuple[Result, Result]:
    initialize(ParallelConfig(), seed=1)
    made = _Make(variant)()
    batch = make_batch(made, next(synthetic_batches(model.seq_length, micro_batch_size=4)))
    return _passes(model, made, [batch]), _passes(model, made, _alone(batch))


@functools.cache
def _results(variant: str) -> tuple[Result, Result]:
    return run_single(_packed_and_alone, variant, ALONE[variant])


@pytest.mark.parametrize("variant", ALONE)
def test_losses_and_gradients_are_the_sums_over_documents_alone(variant: str) -> None:
    (packed, gradients), (alone, expected) = _results(variant)
    assert packed == pytest.approx(alone, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        norm = torch.linalg.norm(wanted)
        assert torch.linalg.norm(gradients[name] - wanted) <= 1e-5 * norm + 1e-9, name


def test_both_kinds_of_sequences_are_among_those_compared() -> None:
    (batch,) = [make_batch([_Documents()], run_single(_first_batch))]
    kinds = {tuple(row.eq(EOD).nonzero().flatten().tolist()) for row in batch["tokens"]}
    assert kinds == set(map(tuple, ENDS))


def _first_batch() -> Batch:
    initialize(ParallelConfig(), seed=1)
    return next(synthetic_batches(TINY.seq_length, micro_batch_size=4))
