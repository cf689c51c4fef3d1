"""Runs one training step or one evaluation.

    loss of a step = weighted mean over the tokens of the global batch; see `output_losses`

A step whose loss or gradient norm is not finite is skipped: it changes no parameter, no optimizer state, no schedule.

The host only queues a step's work, and the device decides whether the step is skipped. The host reads the step's
values when it needs them, at the latest before the next update, because the learning rate depends on whether the step
was skipped. By then the host has queued the next step's forward and backward passes, so the device does not idle
while the host waits.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.platform.host_copy import HostCopy
from megatron_ext.platform.run_phases import EVALUATION, FORWARD_BACKWARD, STEP, UPDATE, in_phase
from megatron_ext.training.engine.data_parallel import unwrap_models
from megatron_ext.training.engine.gradient_norms import (
    clip_gradients,
    gradient_norm,
    zeros_in_gradient,
)
from megatron_ext.training.engine.loss_scale import can_fall, scaler_of
from megatron_ext.training.engine.microbatches import accumulate_gradients, run_microbatches
from megatron_ext.training.engine.optimizer import update_if
from megatron_ext.training.engine.step_values import LayerNames, StepValues
from megatron_ext.training.interface.family_interface import Batch, Family, make_batch
from megatron_ext.training.interface.output_losses import select_output_loss
from megatron_ext.training.interface.own_optimizer import bring_up_to_date


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one step, equal on every rank except `statistics`."""

    losses: dict[str, float]
    """Mean losses before the update, by name: `lm loss` in nats per token, or the losses with which a model family
    replaces it. The values that model families return from `Family.summary` are included.
    """

    layer_losses: dict[str, float]
    """Means of the losses attached to layers and of other values recorded by layers, by name."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""

    params_norm: float | None
    """Global L2 norm of the parameters before the update; None unless `--log-params-norm`."""

    skipped: bool
    """Whether the update was skipped because the loss or gradient norm is not finite."""

    is_overflow: bool = False
    """Whether the step was skipped only because a gradient is too large for fp16, which a lower loss scale may
    prevent.
    """

    num_zeros: float | None = None
    """Number of elements of the gradient that are zero; None unless `--log-num-zeros-in-grad`."""

    loss_scale: float | None = None
    """Loss scale after this step; None without `--fp16`."""

    learning_rate: float
    """Learning rate of this step."""

    shared: list[float]
    """The values that the function `shared`, an argument of `Stepper.start`, returned; empty if it was not given."""

    statistics: dict[str, float]
    """The model families' statistics of this step; empty if none are due. They are complete only on rank 0."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token; nan if a model family's output loss does not compute it."""
        return self.losses.get("lm loss", math.nan)


ReadStep = Callable[[], StepResult]
"""A function that returns the results of a started step; waits until the device has finished the step. Collective."""


class Stepper:
    """Runs training steps and evaluations of one model."""

    def __init__(
        self,
        chunks: list[Any],
        families: list[Family],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        clip_grad: float,
        log_params_norm: bool = False,
        log_num_zeros_in_grad: bool = False,
        per_token_loss: bool = True,
        empty_memory_level: int = 0,
    ) -> None:
        """Args:
        chunks: this rank's model chunks, wrapped by `wrap_model`.
        families: the run's model families, which supply auxiliary inputs, losses and statistics.
        optimizer: the optimizer of `chunks`.
        scheduler: learning-rate schedule, advanced by the number of sequences in each step.
        global_batch_size: sequences per step, over all data-parallel ranks; the default of `batch_size` in `start`.
        micro_batch_size: sequences per micro-batch.
        clip_grad: largest global gradient norm; 0 disables clipping.
        log_params_norm: whether to compute the norm of the parameters in every step.
        log_num_zeros_in_grad: whether to count the zeros of the gradient in every step.
        per_token_loss: whether the gradients are those of the mean loss over tokens; see `run_microbatches`.
        empty_memory_level: release unused memory before the update (1), before and after it (2), or never (0).
        """
        self.chunks = chunks
        self.models: list[GPTModel] = unwrap_models(chunks)
        self.families = families
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.global_batch_size = global_batch_size
        self.scaler = scaler_of(optimizer)
        self.clip_grad = clip_grad
        self.log_params_norm = log_params_norm
        self.log_num_zeros_in_grad = log_num_zeros_in_grad
        self.per_token_loss = per_token_loss
        self.empty_memory_level = empty_memory_level
        copies = parallel_state.get_data_parallel_world_size()
        self._samples_at_once = micro_batch_size * copies
        self.num_microbatches = global_batch_size // self._samples_at_once
        self._layer_names = LayerNames()
        self._read_last: ReadStep | None = None

    def train(self, batches: Iterator[Batch], iteration: int) -> StepResult:
        """Runs one step and returns its results; arguments as for `start`. Collective."""
        return self.start(batches, iteration)()

    @in_phase(STEP)
    def start(
        self,
        batches: Iterator[Batch],
        iteration: int,
        shared: Callable[[], torch.Tensor] | None = None,
        batch_size: int | None = None,
    ) -> ReadStep:
        """Queues one step on the device: forward, backward and update on the next micro-batches. Collective.

        The schedule advances when the results are read, at the latest in the next step.

        Args:
            batches: endless iterator over micro-batches.
            iteration: number of this step, from 1. A model family's statistics are due at multiples of its
                `statistics_interval`.
            shared: returns further values to read together with the step's: float64 on the device, equal on every
                rank.
            batch_size: sequences in this step, over all data-parallel ranks; None for `global_batch_size`.
        """
        batch_size = batch_size or self.global_batch_size
        for family in self.families:
            family.begin_step(self.models, iteration)
        due = [f for f in self.families if f.statistics_interval and iteration % f.statistics_interval == 0]
        for family in due:
            family.begin_statistics(self.models)
        if self.log_params_norm:
            bring_up_to_date(self.optimizer)
        values = self.forward_backward(batches, batch_size)
        statistics = {tag: value for family in due for tag, value in family.statistics(self.models).items()}
        params_norm = [parameters_norm(self.models)] if self.log_params_norm else []
        norm, is_finite = self._update(values)
        zeros = [zeros_in_gradient(self.optimizer)] if self.log_num_zeros_in_grad else []
        of_step = torch.stack((norm, is_finite.double(), *self._of_scaler(values), *params_norm, *zeros))
        further = [shared()] if shared is not None else []
        self._read_last = cache(
            partial(
                self._read,
                iteration,
                values,
                HostCopy(torch.cat((of_step, *further, values.rows.flatten()))),
                learning_rate=get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0,
                statistics=statistics,
                batch_size=batch_size,
            )
        )
        return self._read_last

    def _read(
        self,
        iteration: int,
        values: StepValues,
        copied: HostCopy,
        *,
        learning_rate: float,
        statistics: dict[str, float],
        batch_size: int,
    ) -> StepResult:
        numbers: list[float] = copied.tolist()
        first_row = len(numbers) - values.rows.numel()
        norm, is_finite, *others = numbers[:first_row]
        loss_scale, is_overflow = (others.pop(0), others.pop(0)) if self.scaler is not None else (None, 0.0)
        rows = [numbers[place : place + 2] for place in range(first_row, len(numbers), 2)]
        if is_finite:
            self.scheduler.step(increment=batch_size)
        losses, layer_losses = values.named(rows)
        by_name = losses | layer_losses
        for family in self.families:
            losses |= family.summary(iteration, by_name)
        return StepResult(
            losses=losses,
            layer_losses=layer_losses,
            grad_norm=norm,
            params_norm=others.pop(0) if self.log_params_norm else None,
            num_zeros=others.pop(0) if self.log_num_zeros_in_grad else None,
            skipped=not is_finite,
            is_overflow=not is_finite and bool(is_overflow),
            loss_scale=loss_scale,
            learning_rate=learning_rate,
            shared=others,
            statistics=statistics,
        )

    def _of_scaler(self, values: StepValues) -> list[torch.Tensor]:
        """Returns the loss scale, and whether a non-finite step counts as an overflow; empty without fp16."""
        if self.scaler is None:
            return []
        falls = can_fall(self.scaler)
        overflows = (
            values.are_finite() & falls if falls is not None else torch.zeros_like(self.scaler.scale[0])
        )
        return [self.scaler.scale.squeeze().double(), overflows.double()]

    @in_phase(FORWARD_BACKWARD)
    def forward_backward(self, batches: Iterator[Batch], batch_size: int | None = None) -> StepValues:
        """Computes the gradients of one step's micro-batches, without an update; returns the step's values."""
        num_microbatches = (batch_size or self.global_batch_size) // self._samples_at_once
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        LayerLosses.loss_scale = self.scaler.scale.item() if self.scaler is not None else 1.0
        LayerLosses.scale = LayerLosses.loss_scale / num_microbatches
        taken = self._take(batches, num_microbatches)
        apart = [family for family in self.families if family.trains_apart()]
        if apart:
            accumulate_gradients(self.chunks, taken, partial(apart[0].backward, self.models), self._prepare)
            return StepValues([], (), self._layer_names, of_nothing=0.0)
        output_loss = select_output_loss(family.output_loss() for family in self.families)
        outputs = run_microbatches(
            self.chunks,
            self.families,
            taken,
            output_loss,
            forward_only=False,
            prepare=self._prepare,
            per_token=self.per_token_loss,
        )
        return StepValues(outputs, output_loss.names, self._layer_names, of_nothing=0.0)

    @in_phase(EVALUATION)
    def evaluate(
        self,
        make_batches: Callable[[], Iterator[Batch]],
        num_steps: int,
        split: str = "validation",
        progress: Callable[[str], Callable[[int], None]] = lambda name: lambda steps: None,
    ) -> dict[str, float]:
        """Computes mean losses over `num_steps` global batches without gradients. Collective.

        Args:
            make_batches: returns an iterator over the same batches at every call.
            num_steps: number of global batches.
            split: `validation` or `test`, passed on to the model families.
            progress: called with the name of a pass over the batches; returns a function to call after each step.

        Returns:
            Values by name: `lm loss` in nats per token, values recorded by layers, and values of the model families.
        """
        bring_up_to_date(self.optimizer)
        for family in self.families:
            family.begin_step(self.models, None)
        losses = self._evaluate(make_batches(), num_steps, progress(split))
        for family in self.families:
            losses |= family.evaluation(
                self.models,
                split,
                losses["lm loss"],
                lambda: self._evaluate(make_batches(), num_steps, progress(f"{split}, base"))["lm loss"],
            )
        return losses

    def _evaluate(
        self, batches: Iterator[Batch], num_steps: int, done: Callable[[int], None]
    ) -> dict[str, float]:
        for chunk in self.chunks:
            chunk.eval()
        outputs: list[dict[str, torch.Tensor]] = []
        loss = select_output_loss(family.evaluation_loss() for family in self.families)
        LayerLosses.evaluating = True
        try:
            with torch.no_grad():
                for _ in range(num_steps):
                    outputs += run_microbatches(
                        self.chunks,
                        self.families,
                        self._take(batches, self.num_microbatches),
                        loss,
                        forward_only=True,
                    )
                    self._empty_memory(1)
                    done(1)
        finally:
            LayerLosses.evaluating = False
        losses, layer_values = StepValues(outputs, loss.names, self._layer_names, of_nothing=math.nan).read()
        return losses | layer_values

    def _take(self, batches: Iterator[Batch], number: int) -> list[Batch]:
        return [make_batch(self.families, batch) for batch in islice(batches, number)]

    def _prepare(self, batches: list[Batch]) -> Iterable[Batch]:
        prepared: Iterable[Batch] = batches
        for family in self.families:
            prepared = family.prepare_batches(self.models, self.families, list(prepared))
        return prepared

    @in_phase(UPDATE)
    def _update(self, values: StepValues) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates the parameters if the step is finite.

        Returns:
            The gradients' norm (float64) and whether loss and norm are finite: scalars on the device.
        """
        self._empty_memory(1)
        self.optimizer.prepare_grads()
        norm = gradient_norm(self.optimizer)
        is_finite = values.are_finite() & norm.isfinite()
        if self.clip_grad > 0:
            clip_gradients(self.optimizer, norm, self.clip_grad)
        if self._read_last is not None:
            self._read_last()  # this also sets the learning rate of the current step
        update_if(is_finite, self.optimizer)
        self._empty_memory(2)
        return norm, is_finite

    def _empty_memory(self, level: int) -> None:
        """Releases cached but unused device memory if `--empty-unused-memory-level` is at least `level`."""
        if self.empty_memory_level >= level:
            torch.cuda.empty_cache()


def parameters_norm(models: list[GPTModel]) -> torch.Tensor:
    """Returns the global L2 norm of all parameters, each replicated parameter counted once. Collective.

    The result is a float64 scalar on the device.
    """
    squares = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    for model in models:
        for parameter in model.parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                squares += parameter.detach().double().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return squares.sqrt()
