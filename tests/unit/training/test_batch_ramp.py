"""A run whose batch size grows: each step is a step of its own size, and the schedule counts its samples."""

import io
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, synthetic_batches
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.logging.step_metrics import StepMetrics
from megatron_ext.training.loop import Data, Loop
from tests.unit.training.test_training_step import SETTINGS, make_stepper

SIZES = [2, 2, 4, 6, 6]
"""Of the steps under `RAMP`: 4 samples per increment."""

RAMP = TrainingConfig(
    train_samples=sum(SIZES) + 1, global_batch_size=6, rampup_batch_size=(2, 2, 8), eval_iters=0
)


SCHEDULE = TrainingConfig(
    train_samples=sum(SIZES) + 1,
    step_batch_size_schedule=("0samples:2", "4samples:4", "8samples:6"),
    eval_iters=0,
)
"""The same steps by --step-batch-size-schedule."""


def _scheduled(chunks_and_stepper: tuple[Any, Stepper]) -> Stepper:
    stepper = chunks_and_stepper[1]
    stepper.scheduler = build_scheduler(SETTINGS, RAMP, stepper.optimizer, 6)
    return stepper


def _parameters(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in stepper.models[0].parameters()]


class _Metrics(Reporter):
    seen: list[StepMetrics]

    def step(self, iteration: int, metrics: StepMetrics) -> None:
        self.seen.append(metrics)
        super().step(iteration, metrics)


def _run(training: TrainingConfig) -> tuple[list[StepMetrics], list[torch.Tensor], int]:
    """A run whose batch size grows."""
    initialize(ParallelConfig(), seed=1)
    stepper = _scheduled(make_stepper(ParallelConfig(), global_batch_size=6))
    logging = LoggingConfig(log_throughput=False)
    data = Data(train=lambda _: synthetic_batches(TINY.seq_length), valid=None, test=None)
    reporter = _Metrics(logging, total_iterations=len(SIZES), stream=io.StringIO())
    reporter.seen = []
    loop = Loop(
        training,
        CheckpointConfig(),
        stepper,
        None,  # type: ignore[arg-type]  # nothing is saved
        reporter,
        data,
        sequence_length=TINY.seq_length,
        flops_per_token=lambda _: 1.0,
    )
    _, progress = loop.run(TrainingProgress())
    assert progress.iteration == len(SIZES)
    return reporter.seen, _parameters(stepper), progress.consumed_samples


def _by_hand() -> tuple[list[float], list[torch.Tensor]]:
    """One step after the other, each by a stepper for its own constant size."""
    first = _scheduled(make_stepper(ParallelConfig(), global_batch_size=6))
    batches, losses = synthetic_batches(TINY.seq_length), []
    for iteration, size in enumerate(SIZES, start=1):
        stepper = Stepper(
            first.chunks,
            [],
            first.optimizer,
            first.scheduler,
            global_batch_size=size,
            micro_batch_size=1,
            clip_grad=1.0,
        )
        losses.append(stepper.train(batches, iteration).loss)
    return losses, _parameters(first)


@pytest.mark.parametrize("training", [RAMP, SCHEDULE], ids=["ramp", "schedule"])
def test_every_step_is_a_step_of_its_own_size_and_the_schedule_counts_samples(
    training: TrainingConfig,
) -> None:
    metrics, parameters, consumed = run_single(_run, training)
    losses, wanted = run_single(_by_hand)
    assert [each.batch_size for each in metrics] == SIZES
    assert [each.tokens for each in metrics] == [size * TINY.seq_length for size in SIZES]
    assert consumed == sum(SIZES) == metrics[-1].consumed_samples
    assert [each.losses["lm loss"] for each in metrics] == losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, wanted, strict=True))
    # The cosine over all samples of the run, at the samples before each step.
    shares = torch.tensor([sum(SIZES[:step]) for step in range(len(SIZES))]).double() / sum(SIZES)
    rates = SETTINGS.min_lr + (SETTINGS.lr - SETTINGS.min_lr) * (1 + torch.cos(torch.pi * shares)) / 2
    assert [each.learning_rate for each in metrics] == pytest.approx(rates.tolist(), rel=1e-12)
