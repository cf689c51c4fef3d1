"""Runs one training step or one evaluation.

    loss of a step = weighted mean over the tokens of the global batch; see `output_losses`

A step whose loss or gradient norm is not finite is skipped: it changes no parameter, no optimizer state, no schedule.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.platform.run_phases import EVALUATION, FORWARD_BACKWARD, STEP, UPDATE, in_phase
from megatron_ext.training.engine.data_parallel import unwrap_models
from megatron_ext.training.engine.gradient_norms import clip_gradients, gradient_norm
from megatron_ext.training.engine.microbatches import accumulate_gradients, run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family, make_batch
from megatron_ext.training.interface.output_losses import select_output_loss


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one step, equal on every rank except `statistics`."""

    losses: dict[str, float]
    """Mean losses before the update, by name: `lm loss` in nats per token, or the losses of the model family that
    replaces it. The values that model families return from `Family.summary` are included."""

    layer_losses: dict[str, float]
    """Means of the losses attached to layers and of other values recorded by layers, by name."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""

    params_norm: float | None
    """Global L2 norm of the parameters before the update; None unless `--log-params-norm`."""

    skipped: bool
    """Whether the update was skipped because the loss or gradient norm is not finite."""

    statistics: dict[str, float]
    """The model families' statistics of this step; empty if none are due. They are complete only on rank 0."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token; nan if a model family's output loss does not compute it."""
        return self.losses.get("lm loss", math.nan)


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
    ) -> None:
        """Args:
        chunks: this rank's model chunks, wrapped by `wrap_model`.
        families: the run's model families, which supply auxiliary inputs, losses and statistics.
        optimizer: the optimizer of `chunks`.
        scheduler: learning-rate schedule, advanced by `global_batch_size` samples per step.
        global_batch_size: sequences per step, over all data-parallel ranks.
        micro_batch_size: sequences per micro-batch.
        clip_grad: largest global gradient norm; 0 disables clipping.
        log_params_norm: whether to compute the norm of the parameters in every step.
        """
        self.chunks = chunks
        self.models: list[GPTModel] = unwrap_models(chunks)
        self.families = families
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.global_batch_size = global_batch_size
        self.clip_grad = clip_grad
        self.log_params_norm = log_params_norm
        copies = parallel_state.get_data_parallel_world_size()
        self.num_microbatches = global_batch_size // (micro_batch_size * copies)

    @in_phase(STEP)
    def train(self, batches: Iterator[Batch], iteration: int) -> StepResult:
        """Runs one step: forward, backward and update on the next micro-batches. Collective.

        Args:
            batches: endless iterator, from which the step takes `num_microbatches` micro-batches.
            iteration: number of this step, from 1. A model family's statistics are due at multiples of its
                `statistics_interval`.
        """
        for family in self.families:
            family.begin_step(self.models, iteration)
        due = [f for f in self.families if f.statistics_interval and iteration % f.statistics_interval == 0]
        for family in due:
            family.begin_statistics(self.models)
        losses, layer_losses = self.forward_backward(batches)
        statistics = {tag: value for family in due for tag, value in family.statistics(self.models).items()}
        params_norm = parameters_norm(self.models) if self.log_params_norm else None
        grad_norm, skipped = self._update(losses)
        values = losses | layer_losses
        summaries = {
            name: value for family in self.families for name, value in family.summary(values).items()
        }
        return StepResult(
            losses=losses | summaries,
            layer_losses=layer_losses,
            grad_norm=grad_norm,
            params_norm=params_norm,
            skipped=skipped,
            statistics=statistics,
        )

    @in_phase(FORWARD_BACKWARD)
    def forward_backward(self, batches: Iterator[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Computes the gradients of one step's micro-batches, without an update.

        Returns:
            The mean losses, and the means of the layers' values, both by name.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        LayerLosses.scale = 1.0 / self.num_microbatches
        taken = self._take(batches)
        apart = [family for family in self.families if family.trains_apart()]
        if apart:
            accumulate_gradients(self.chunks, taken, partial(apart[0].backward, self.models), self._prepare)
            return {}, LayerLosses.collect()
        output_loss = select_output_loss(family.output_loss() for family in self.families)
        outputs = run_microbatches(
            self.chunks, self.families, taken, output_loss, forward_only=False, prepare=self._prepare
        )
        return _means(outputs, output_loss.names, of_nothing=0.0), LayerLosses.collect()

    @in_phase(EVALUATION)
    def evaluate(
        self, make_batches: Callable[[], Iterator[Batch]], num_steps: int, split: str = "validation"
    ) -> dict[str, float]:
        """Computes mean losses over `num_steps` global batches without gradients. Collective.

        Args:
            make_batches: returns an iterator over the batches, the same ones at every call.
            num_steps: number of global batches.
            split: `validation` or `test`, passed on to the model families.

        Returns:
            Values by name: `lm loss` in nats per token, values recorded by layers, and values of the model families.
        """
        for family in self.families:
            family.begin_step(self.models, None)
        losses = self._evaluate(make_batches(), num_steps)
        for family in self.families:
            losses |= family.evaluation(
                self.models,
                split,
                losses["lm loss"],
                lambda: self._evaluate(make_batches(), num_steps)["lm loss"],
            )
        return losses

    def _evaluate(self, batches: Iterator[Batch], num_steps: int) -> dict[str, float]:
        for chunk in self.chunks:
            chunk.eval()
        outputs: list[dict[str, torch.Tensor]] = []
        loss = select_output_loss(family.evaluation_loss() for family in self.families)
        LayerLosses.evaluating = True
        try:
            with torch.no_grad():
                for _ in range(num_steps):
                    outputs += run_microbatches(
                        self.chunks, self.families, self._take(batches), loss, forward_only=True
                    )
        finally:
            LayerLosses.evaluating = False
        return _means(outputs, loss.names, of_nothing=math.nan) | LayerLosses.collect()

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        return [make_batch(self.families, batch) for batch in islice(batches, self.num_microbatches)]

    def _prepare(self, batches: list[Batch]) -> Iterable[Batch]:
        prepared: Iterable[Batch] = batches
        for family in self.families:
            prepared = family.prepare_batches(self.models, self.families, list(prepared))
        return prepared

    @in_phase(UPDATE)
    def _update(self, losses: dict[str, float]) -> tuple[float, bool]:
        self.optimizer.prepare_grads()
        norm = float(gradient_norm(self.optimizer))
        if not all(math.isfinite(value) for value in (*losses.values(), norm)):
            return norm, True
        if self.clip_grad > 0:
            clip_gradients(self.optimizer, norm, self.clip_grad)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=self.global_batch_size)
        return norm, False


def parameters_norm(models: list[GPTModel]) -> float:
    """Returns the global L2 norm of all parameters, each replicated parameter counted once. Collective."""
    squares = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    for model in models:
        for parameter in model.parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                squares += parameter.detach().double().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return math.sqrt(float(squares))


def _means(
    outputs: list[dict[str, torch.Tensor]], names: tuple[str, ...], *, of_nothing: float
) -> dict[str, float]:
    """Returns weighted means over the tokens of all micro-batches and data-parallel ranks, by name. Collective.

    Args:
        outputs: one mapping per micro-batch, from name to a tensor [weighted sum, sum of weights]; on stages other than
            the last an empty list.
        names: the names of the values, in the same order on every rank.
        of_nothing: the mean to return for a value whose weights are all 0.
    """
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=process_groups.device())
    for output in outputs:
        sums += torch.stack([output[name] for name in names]) if names else 0.0
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # The other stages contribute zeros, so the sum over the stages is the last stage's value.
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return {
        name: total / weight if weight else of_nothing
        for name, (total, weight) in zip(names, sums.tolist(), strict=True)
    }
