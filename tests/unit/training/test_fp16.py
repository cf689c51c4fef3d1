"""Steps in fp16: their gradients are those of fp32, overflows change nothing but the loss scale, and end no run."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision, TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper, StepResult
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.loop import EXIT_NOT_FINITE, EXIT_OK, Data, Loop
from tests.unit.training.test_training_step import snapshot

TRAINING = TrainingConfig(train_iters=12, eval_iters=0, fp16=True)


def _stepper(settings: OptimizerSettings) -> tuple[list[GPTModel], Stepper]:
    initialize(ParallelConfig(), seed=1)
    chunks = build_model(TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, precision="fp16")
    wrapped = wrap_model(chunks, ParallelConfig(), precision="fp16")
    optimizer = build_optimizer(settings, ParallelConfig(), wrapped, [], precision="fp16")
    return chunks, Stepper(
        wrapped,
        [],
        optimizer,
        build_scheduler(settings, TRAINING, optimizer, 4),
        global_batch_size=4,
        micro_batch_size=1,
        clip_grad=1.0,
    )


def _scale_by_hand(settings: OptimizerSettings, skipped: list[bool]) -> list[float]:
    """The loss scale after each step by Megatron's rule: halved from the --hysteresis-th overflow on until it rises."""
    scale, good, left, scales = settings.initial_loss_scale, 0, settings.hysteresis, []
    for overflows in skipped:
        good, left = (0, left - 1) if overflows else (good + 1, left)
        if overflows and left <= 0:
            scale = max(scale / 2, settings.min_loss_scale)
        elif good == settings.loss_scale_window:
            scale, good, left = 2 * scale, 0, settings.hysteresis
        scales.append(scale)
    return scales


RISING = OptimizerSettings(lr=5e-3, initial_loss_scale=2.0**22, loss_scale_window=3, hysteresis=2)


def _steps() -> tuple[list[StepResult], list[bool], list[int]]:
    """Twelve steps; after each whether weights, moments and schedule are as before it; the schedule's positions."""
    chunks, stepper = _stepper(RISING)
    batches, results, unchanged, positions = synthetic_batches(TINY.seq_length), [], [], []
    before = snapshot(chunks, stepper)
    for iteration in range(1, 13):
        results.append(stepper.train(batches, iteration))
        after = snapshot(chunks, stepper)
        unchanged.append(
            before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        )
        positions.append(stepper.scheduler.num_steps)
        before = after
    return results, unchanged, positions


def test_an_overflow_changes_nothing_but_the_scale_which_follows_megatrons_rule() -> None:
    results, unchanged, positions = run_single(_steps)
    skipped = [result.skipped for result in results]
    assert skipped[0] and 2 <= sum(skipped) <= 9, "the test needs steps of both kinds"
    assert [result.is_overflow for result in results] == skipped
    assert [result.loss_scale for result in results] == _scale_by_hand(RISING, skipped)
    assert unchanged[1:] == skipped[1:]  # the first step also creates the moments
    assert positions == [4 * (n + 1 - sum(skipped[: n + 1])) for n in range(12)]
    assert results[-1].losses["lm loss"] < results[0].losses["lm loss"]


def _gradients(precision: Precision) -> dict[str, torch.Tensor]:
    """The gradients of the first step; in fp16 as the optimizer has them, before clipping."""
    initialize(ParallelConfig(), seed=1)
    chunks = build_model(TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, precision=precision)
    wrapped = wrap_model(chunks, ParallelConfig(), precision=precision)
    settings = (
        OptimizerSettings(lr=1.0, loss_scale=2.0**13) if precision == "fp16" else OptimizerSettings(lr=1.0)
    )
    optimizer = build_optimizer(settings, ParallelConfig(), wrapped, [], precision=precision)
    scheduler = build_scheduler(settings, TRAINING, optimizer, 4)
    stepper = Stepper(
        wrapped, [], optimizer, scheduler, global_batch_size=4, micro_batch_size=1, clip_grad=0.0
    )
    stepper.forward_backward(synthetic_batches(TINY.seq_length))
    optimizer.prepare_grads()
    names = {parameter: name for name, parameter in chunks[0].named_parameters()}
    found = {name: getattr(parameter, "main_param", parameter).grad for parameter, name in names.items()}
    return {name: gradient.clone() for name, gradient in found.items()}


def test_the_unscaled_gradients_are_those_of_fp32_within_the_rounding_of_fp16() -> None:
    scaled, exact = run_single(_gradients, "fp16"), run_single(_gradients, "fp32")
    assert scaled.keys() == exact.keys()
    for name, gradient in exact.items():
        assert scaled[name].dtype == torch.float32
        assert torch.linalg.norm(scaled[name] - gradient) < 5e-3 * torch.linalg.norm(gradient), name


def _run(changes: dict[str, Any], poisoned: bool) -> tuple[int, int, int, str]:
    """A run of twelve steps at most, with a NaN in its weights if `poisoned`: exit code, steps, skipped, printed."""
    chunks, stepper = _stepper(replace(RISING, **changes))
    if poisoned:
        next(chunks[0].parameters()).data[0, 0] = float("nan")
        stepper.optimizer.reload_model_params()
    stream = io.StringIO()
    with Reporter(
        LoggingConfig(log_interval=1, log_throughput=False), total_iterations=12, stream=stream
    ) as reporter:
        loop = Loop(
            TRAINING,
            CheckpointConfig(),
            stepper,
            None,  # type: ignore[arg-type]  # nothing is saved
            reporter,
            Data(train=lambda _: synthetic_batches(TINY.seq_length), valid=None, test=None),
            sequence_length=TINY.seq_length,
            flops_per_token=lambda _: 1.0,
        )
        code, progress = loop.run(TrainingProgress())
    return code, progress.iteration, progress.skipped_steps, stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "poisoned", "expected"),
    [
        ({"initial_loss_scale": 2.0**28, "hysteresis": 1}, False, (EXIT_OK, 12)),
        ({"loss_scale": 2.0**40}, False, (EXIT_NOT_FINITE, 3)),
        (
            {"initial_loss_scale": 2.0**30, "min_loss_scale": 2.0**29, "hysteresis": 1},
            False,
            (EXIT_NOT_FINITE, 3),
        ),
        ({"initial_loss_scale": 4.0}, True, (EXIT_NOT_FINITE, 3)),
    ],
    ids=["the scale falls", "a fixed scale", "a scale at its minimum", "a loss that is not finite"],
)
def test_overflows_end_a_run_only_if_a_lower_scale_cannot_help(
    changes: dict[str, Any], poisoned: bool, expected: tuple[int, int]
) -> None:
    code, steps, skipped, printed = run_single(_run, changes, poisoned)
    assert (code, steps) == expected
    assert skipped > 3 if code == EXIT_OK else skipped == 3
    assert "| loss scale " in printed


def _dtypes(precision: Precision, flags: dict[str, bool]) -> set[torch.dtype]:
    """Precisions of the weights' gradient sums."""
    initialize(ParallelConfig(), seed=1)
    parallel = ParallelConfig(**flags)  # type: ignore[arg-type]
    chunks = build_model(TINY, parallel, vocab_size=VOCAB_SIZE, seed=1, precision=precision)
    (wrapped,) = wrap_model(chunks, parallel, precision=precision)
    return {parameter.main_grad.dtype for parameter in wrapped.parameters()}


@pytest.mark.parametrize(
    ("precision", "flags", "dtype"),
    [
        ("fp32", {}, torch.float32),
        ("bf16", {}, torch.float32),
        ("bf16", {"accumulate_allreduce_grads_in_fp32": True}, torch.float32),
        ("bf16", {"grad_reduce_in_bf16": True}, torch.bfloat16),
        ("fp16", {}, torch.float16),
        ("fp16", {"accumulate_allreduce_grads_in_fp32": True}, torch.float32),
    ],
)
def test_gradients_are_summed_in_the_precision_that_the_flags_name(
    precision: str, flags: dict[str, bool], dtype: torch.dtype
) -> None:
    assert run_single(_dtypes, precision, flags) == {dtype}
