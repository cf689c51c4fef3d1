"""Measures the trained parameters and the FLOPs of a training step, to test the predictions of `--dry-run`."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.activation_memory import ParallelLayout
from megatron_ext.models.costs.memory_estimate import estimate_memory
from megatron_ext.models.costs.model_cost import training_flops_per_token
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.tiny_training import GLOBAL_BATCH_SIZE, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.logging.family_costs import RunCost, run_cost


@dataclass(frozen=True)
class StepFigures:
    """Figures for one training step, either measured or predicted."""

    trained: int
    """Number of trainable parameters."""

    parameters: int
    gradient_bytes: float
    optimizer_bytes: float
    flops: float
    """FLOPs of all matrix products in the step."""


def measured_and_predicted(
    family: Family, model: ModelConfig, iteration: int, earlier_steps: int = 0
) -> tuple[StepFigures, StepFigures]:
    """Runs one training step in this process; returns its measured figures and those that `--dry-run` predicts.

    Args:
        family: the model family that the model is built with.
        model: configuration with `attention_backend="local"`, so that torch counts each matrix product of attention.
        iteration: number of the step.
        earlier_steps: number of steps on the same sequences to run before the measured one.
    """
    parallel = ParallelConfig()
    run = TinyRun(
        RunSettings(
            parallel=parallel, checkpoint=CheckpointConfig(), model=model, make_families=lambda: [family]
        )
    )
    batches = _with_masks(model.seq_length)
    for _ in range(earlier_steps):
        run.stepper.train(batches, iteration)
    with FlopCounterMode(display=False) as counter:
        run.stepper.train(batches, iteration)
    parameters = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    moments = [value for state in run.optimizer.optimizer.state.values() for value in state.values()]
    measured = StepFigures(
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        parameters=sum(parameter.numel() for parameter in parameters),
        gradient_bytes=sum(
            buffer.grad_data.nbytes for chunk in run.stepper.chunks for buffer in chunk.buffers
        ),
        optimizer_bytes=sum(moment.nbytes for moment in moments if moment.dim()),
        flops=counter.get_total_flops(),
    )
    cost = run_cost(model, VOCAB_SIZE, 1, [family], iteration)
    return measured, _predicted(cost, model, parallel)


def _predicted(cost: RunCost, model: ModelConfig, parallel: ParallelConfig) -> StepFigures:
    base, *families = cost.parts.values()
    layout = ParallelLayout(
        model=model,
        parallel=parallel,
        vocab_size=VOCAB_SIZE,
        micro_batch_size=1,
        num_microbatches=GLOBAL_BATCH_SIZE,
        data_parallel_size=1,
        work=cost.work,
    )
    own, own_trained = (
        sum(part.parameters for part in families),
        sum(part.trained_parameters for part in families),
    )
    (memory,) = estimate_memory(layout, own, own_trained)
    assert memory.trained_parameters == base.trained_parameters + own_trained
    return StepFigures(
        trained=memory.trained_parameters,
        parameters=memory.parameters,
        gradient_bytes=memory.gradient_bytes,
        optimizer_bytes=memory.optimizer_bytes,
        flops=training_flops_per_token(cost.parts.values()) * GLOBAL_BATCH_SIZE * model.seq_length,
    )


def _with_masks(length: int) -> Iterator[Batch]:
    """Repeats the same synthetic batches without end, with the attention mask that local attention needs."""
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    for batch in cycle(islice(synthetic_batches(length), GLOBAL_BATCH_SIZE)):
        yield batch | {"attention_mask": mask}
