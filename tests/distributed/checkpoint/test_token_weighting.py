"""Every counted token of a global batch has the same weight, however the batch is divided.

The masks leave very different numbers of tokens in the sequences, so a mean of micro-batches' means would differ.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import CONTEXT_LAYOUTS, LAYOUTS, TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch, Family
from tests.unit.progressive.objective_helpers import MLM, ObjectiveFamily

GLOBAL_BATCH_SIZE = 4
MODEL = replace(TINY, init_method_std=0.1)

OUTER = NPTModuleConfig(npt_layers="1,2,3", np_form="outer_product", np_rank=8, np_init_scale=0.3)
LOW_RANK = NPTModuleConfig(npt_layers="upper_half", np_target="gate+up", np_rank=8, np_residual="keep")
MULTI_LAYER = NPTTrainingConfig(mode="multi_layer", curriculum_stages="mixed:1:0.3:0.6", lm_weight=0.5)
SINGLE_LAYER = NPTTrainingConfig(mode="single_layer", stage1_steps=1)
EQUIVALENCE = NPTTrainingConfig(
    mode="equivalence", fidelity_weight=1.0, fidelity_loss="mse", layer_losses="document"
)
DIFFUSION = replace(MLM, training_objective="diffusion")

OBJECTIVES: dict[str, object] = {
    "clm": None,
    "per-layer embedding": PerLayerConfig(
        use_per_layer_embedding=True, per_layer_hidden_size=8, per_layer_vocab_size=40
    ),
    "mlm": MLM,
    "diffusion": DIFFUSION,
    "npt multi_layer": (OUTER, MULTI_LAYER),
    "npt multi_layer, the documents' losses": (OUTER, replace(MULTI_LAYER, layer_losses="document")),
    "npt single_layer": (replace(OUTER, npt_layers="2"), SINGLE_LAYER),
    "npt equivalence": (LOW_RANK, replace(EQUIVALENCE, layer_losses="local")),
    "npt equivalence, the document's losses": (LOW_RANK, EQUIVALENCE),
}

DIVISIONS = {
    **{f"DP1 micro-batch {size}": (1, "TP1", size) for size in (1, 2, 4)},
    **{f"DP2 micro-batch {size}": (2, "DP2", size) for size in (1, 2)},
    "DP2 distributed optimizer": (2, "DP2 distributed optimizer", 1),
    "TP2+SP micro-batch 2": (2, "TP2+SP", 2),
    "PP2 micro-batch 1": (2, "PP2", 1),
    "PP2 interleaved micro-batch 2": (2, "PP2 interleaved", 2),
    **{f"CP2 micro-batch {size}": (2, "CP2", size) for size in (1, 2)},
    "CP4 micro-batch 2": (4, "CP4", 2),
    "PP2xCP2 micro-batch 2": (4, "PP2xCP2", 2),
    "DP2xCP2 micro-batch 1": (4, "DP2xCP2", 1),
}
"""Name -> processes, parallel layout, micro-batch size."""

BY_MICRO_BATCH = {
    **{f"DP1 micro-batch {size}": (1, "TP1", size) for size in (1, 2)},
    "DP2 micro-batch 2": (2, "DP2", 2),
    "TP2+SP micro-batch 2": (2, "TP2+SP", 2),
    "PP2 interleaved micro-batch 2": (2, "PP2 interleaved", 2),
    "CP2 micro-batch 2": (2, "CP2", 2),
}
"""Divisions with --no-calculate-per-token-loss, in which the division counts."""

PARALLEL = LAYOUTS | {name: parallel for name, (parallel, _) in CONTEXT_LAYOUTS.items()}


@dataclass(frozen=True)
class Found:
    """What one step and one evaluation give."""

    loss: float
    grad_norm: float
    norm_by_micro_batch: float | None
    """Gradient norm with --no-calculate-per-token-loss; None where it is not measured."""
    layer_losses: dict[str, float]
    validation: float


def families(objective: str) -> list[Family]:
    """The families of a run with this objective."""
    made = OBJECTIVES[objective]
    if isinstance(made, PerLayerConfig):
        return [PerLayerFamily(made, VOCAB_SIZE, torch.arange(VOCAB_SIZE) * 11 % 40)]
    if isinstance(made, ProgressiveConfig):
        return [ObjectiveFamily(made)]
    if isinstance(made, tuple):
        return [NPTFamily(*made, total_steps=1)]
    return []


def masked_batches(micro_batch_size: int) -> Iterator[Batch]:
    """Micro-batches of which sequence i of the global batch has its first 4 i tokens masked."""
    copies = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    first = rank * micro_batch_size
    for batch in synthetic_batches(MODEL.seq_length, micro_batch_size, GLOBAL_BATCH_SIZE):
        for row in range(micro_batch_size):
            batch["loss_mask"][row, : 4 * (first + row)] = 0.0
        yield batch
        first = (first + copies * micro_batch_size) % GLOBAL_BATCH_SIZE


def make_stepper(parallel: ParallelConfig, micro_batch_size: int, objective: str) -> Stepper:
    """A tiny model at this layout, and its families."""
    initialize(parallel, seed=1)
    of_run = families(objective)
    extensions = [family.extension() for family in of_run]
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    for family in of_run:
        family.prepare_model(chunks)
    wrapped = wrap_model(chunks, parallel)
    settings = OptimizerSettings(lr=1e-3, lr_decay_style="constant")
    optimizer = build_optimizer(settings, parallel, wrapped, of_run)
    return Stepper(
        wrapped,
        of_run,
        optimizer,
        build_scheduler(settings, TrainingConfig(train_iters=4), optimizer, GLOBAL_BATCH_SIZE),
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=micro_batch_size,
        clip_grad=0.0,
    )


def _measure(cases: dict[str, tuple[int, str, int]]) -> dict[tuple[str, str], Found]:
    found = {}
    for name, (_, layout, micro_batch_size) in cases.items():
        for objective in OBJECTIVES:
            stepper = make_stepper(PARALLEL[layout], micro_batch_size, objective)
            steps = 2 if objective == "clm" else 1  # every objective's means over steps are computed alike
            validation = stepper.evaluate(lambda size=micro_batch_size: masked_batches(size), steps)[  # type: ignore[misc]
                "lm loss"
            ]
            step = stepper.train(masked_batches(micro_batch_size), 1)
            norm = None
            if objective == "clm" and name in BY_MICRO_BATCH:
                stepper = make_stepper(PARALLEL[layout], micro_batch_size, objective)
                stepper.per_token_loss = False
                norm = stepper.train(masked_batches(micro_batch_size), 1).grad_norm
            found[name, objective] = Found(step.loss, step.grad_norm, norm, step.layer_losses, validation)
    return found


@functools.cache
def measured(processes: int) -> dict[tuple[str, str], Found]:
    """Every division that runs in so many processes, with every objective."""
    cases = {name: case for name, case in DIVISIONS.items() if case[0] == processes}
    return run_distributed(_measure, processes, cases)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("division", list(DIVISIONS)[1:])
def test_masked_tokens_leave_loss_and_gradient_norm_of_a_step_the_same_for_every_division(
    division: str, objective: str
) -> None:
    wanted = measured(1)[next(iter(DIVISIONS)), objective]
    found = measured(DIVISIONS[division][0])[division, objective]
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6, nan_ok=True)
    assert found.layer_losses == pytest.approx(wanted.layer_losses, rel=1e-5)
    assert found.validation == pytest.approx(wanted.validation, rel=1e-6)


def _by_autograd(parts: list[tuple[slice, slice]] | None = None) -> tuple[float, float]:
    """Loss and gradient norm of the mean over all unmasked tokens, the whole global batch at once on the bare model.

    With `parts` (rows and positions) of the mean over the parts of each one's mean.
    """
    initialize(ParallelConfig(), seed=1)
    (model,) = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)
    batch = next(masked_batches(GLOBAL_BATCH_SIZE))
    logits = model(batch["tokens"], batch["position_ids"], None)
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    if parts is None:
        loss = losses[batch["loss_mask"].flatten() > 0].mean()
    else:
        mask, by_row = batch["loss_mask"], losses.view_as(batch["loss_mask"]) * batch["loss_mask"]
        loss = torch.stack([by_row[part].sum() / mask[part].sum().clamp(min=1) for part in parts]).mean()
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


def test_a_step_s_loss_and_gradient_norm_are_those_of_the_mean_over_all_unmasked_tokens() -> None:
    loss, norm = run_single(_by_autograd)
    found = measured(1)["DP1 micro-batch 1", "clm"]
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("division", BY_MICRO_BATCH)
def test_without_per_token_loss_a_step_s_gradient_is_that_of_the_mean_of_micro_batches_means(
    division: str,
) -> None:
    processes, layout, size = BY_MICRO_BATCH[division]
    rows = [slice(first, first + size) for first in range(0, GLOBAL_BATCH_SIZE, size)]
    quarter = MODEL.seq_length // 4
    places = [slice(None)]
    parts = [(row, place) for row in rows for place in places]
    if layout == "CP2":  # rank 0 has the first and the last quarter, rank 1 those in the middle
        outer = torch.arange(MODEL.seq_length).roll(quarter)[: 2 * quarter]
        parts = [(row, place) for row in rows for place in (outer, slice(quarter, 3 * quarter))]  # type: ignore[misc]
    _, norm = run_single(_by_autograd, parts)
    found = measured(processes)[division, "clm"]
    assert found.norm_by_micro_batch == pytest.approx(norm, rel=1e-5)
    assert found.norm_by_micro_batch != pytest.approx(found.grad_norm, rel=1e-2)


def _nothing_counts() -> tuple[float, float, bool, float]:
    stepper = make_stepper(ParallelConfig(), 2, "clm")

    def batches() -> Iterator[Batch]:
        for batch in masked_batches(2):
            yield batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}

    validation = stepper.evaluate(batches, 1)["lm loss"]
    step = stepper.train(batches(), 1)
    return step.loss, step.grad_norm, step.skipped, validation


def test_a_step_whose_tokens_are_all_masked_has_no_gradient_and_an_evaluation_of_none_has_no_value() -> None:
    loss, norm, skipped, validation = run_single(_nothing_counts)
    assert (loss, norm, skipped) == (0.0, 0.0, False)
    assert math.isnan(validation)
