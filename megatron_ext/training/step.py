"""One training step, and one evaluation, on megatron-core's pipeline schedules.

    loss of a micro-batch = sum(loss * mask) / sum(mask); of a step = its mean over micro-batches and model copies

A step whose loss or gradient norm is not finite changes nothing: no parameter, no optimizer state.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.layer_loss import LayerLosses
from megatron_ext.training.family import Batch, Family
from megatron_ext.training.optimizer import unwrap_model


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean cross-entropy a token in nats, before the update."""

    layer_losses: dict[str, float]
    """Losses attached to layers, by name."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""

    skipped: bool
    """Loss or gradient was not finite; nothing was changed."""

    statistics: dict[str, float]
    """Families' statistics of this step, where they were due; complete on rank 0."""


class Stepper:
    """Runs steps and evaluations of one model."""

    def __init__(
        self,
        chunks: list[Any],
        families: list[Family],
        *,
        sequence_length: int,
        micro_batch_size: int,
        num_microbatches: int,
    ) -> None:
        """Args:
        chunks: the wrapped model chunks of this rank.
        families: asked for their model inputs and statistics.
        sequence_length: tokens in a sequence.
        micro_batch_size: sequences in a micro-batch.
        num_microbatches: micro-batches in a step on this rank.
        """
        self.chunks = chunks
        self.models: list[GPTModel] = unwrap_model(chunks)
        self.families = families
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = num_microbatches
        self._schedule = get_forward_backward_func()

    def train(
        self,
        batches: Iterator[Batch],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        iteration: int,
        clip_grad: float,
    ) -> StepResult:
        """Forward, backward and update on the next micro-batches.

        Args:
            batches: endless; `num_microbatches` are taken.
            optimizer: over `chunks`.
            scheduler: stepped by the global batch.
            iteration: number of this step, from 1; families' statistics are due at multiples of their interval.
            clip_grad: largest gradient norm, 0 for none.
        """
        due = [f for f in self.families if f.statistics_interval and iteration % f.statistics_interval == 0]
        for family in due:
            family.begin_statistics(self.models)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        LayerLosses.scale = 1.0 / self.num_microbatches
        loss, layer_losses = self._run(batches, forward_only=False)
        statistics = {tag: value for family in due for tag, value in family.statistics(self.models).items()}
        grad_norm, skipped = self._update(optimizer, loss, clip_grad)
        if not skipped:
            copies = parallel_state.get_data_parallel_world_size()
            scheduler.step(increment=self.num_microbatches * self.micro_batch_size * copies)
        return StepResult(
            loss=loss, layer_losses=layer_losses, grad_norm=grad_norm, skipped=skipped, statistics=statistics
        )

    def evaluate(self, batches: Iterator[Batch], num_steps: int) -> tuple[float, dict[str, float]]:
        """Mean loss over `num_steps` global batches without gradients, and the means of the layers' losses."""
        for chunk in self.chunks:
            chunk.eval()
        totals: list[float] = []
        layer_totals: dict[str, float] = {}
        LayerLosses.evaluating = True
        try:
            with torch.no_grad():
                for _ in range(num_steps):
                    loss, layer_losses = self._run(batches, forward_only=True)
                    totals.append(loss)
                    for name, value in layer_losses.items():
                        layer_totals[name] = layer_totals.get(name, 0.0) + value / num_steps
        finally:
            LayerLosses.evaluating = False
        return math.fsum(totals) / num_steps, layer_totals

    def _run(self, batches: Iterator[Batch], *, forward_only: bool) -> tuple[float, dict[str, float]]:
        device = torch.device(torch.cuda.current_device())
        taken = [
            {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            for _ in range(self.num_microbatches)
        ]
        outputs = self._schedule(
            forward_step_func=self._forward_step,
            # Every virtual stage works on the same micro-batches.
            data_iterator=[iter(taken) for _ in self.chunks] if len(self.chunks) > 1 else iter(taken),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=self.num_microbatches,
            seq_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
            adjust_tensor_shapes_fn=self._shapes_function(),
        )
        return self._mean_loss(outputs, device), LayerLosses.collect()

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        side_inputs: dict[str, torch.Tensor] = {}
        for family in self.families:
            side_inputs |= family.side_inputs(batch)
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            side_inputs=side_inputs,
            labels=batch["labels"],
        )
        return output, partial(masked_mean, batch["loss_mask"])

    def _shapes_function(self) -> Any:
        """Tells the 1F1B schedule that the tensor between stages is wider by the travelling streams."""
        width = self.models[0].channel.pipeline_width
        if not width or len(self.chunks) > 1 or parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return None

        def adjust(receive: list[Any], send: list[Any]) -> tuple[list[Any], list[Any]]:
            return [_widened(shape, width) for shape in receive], [_widened(shape, width) for shape in send]

        return adjust

    def _mean_loss(self, outputs: list[dict[str, torch.Tensor]], device: torch.device) -> float:
        """Mean over micro-batches and model copies; the last stage knows it, every rank gets it."""
        total = torch.zeros(2, dtype=torch.float64, device=device)
        if outputs:
            total[0] = torch.stack([output["lm loss"] for output in outputs]).double().sum()
            total[1] = len(outputs)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        # Other stages contribute nothing; the sum over stages is the last stage's value.
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return float(total[0] / total[1])

    def _update(self, optimizer: MegatronOptimizer, loss: float, clip_grad: float) -> tuple[float, bool]:
        optimizer.prepare_grads()
        norm = float(optimizer.clip_grad_norm(clip_grad) if clip_grad > 0 else optimizer.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return norm, True
        optimizer.step_with_ready_grads()
        return norm, False


def masked_mean(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean of the losses [b, s] where the mask [b, s] is not 0, and the same detached for the log."""
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum() / mask.sum().clamp(min=1.0)
    return loss, {"lm loss": loss.detach().clone()}


def _widened(shape: Any, width: int) -> Any:
    return None if shape is None else (*shape[:-1], shape[-1] + width)
