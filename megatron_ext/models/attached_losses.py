"""Losses that belong to a layer, wherever its pipeline stage is.

megatron-core calls the loss function on the last stage only. A loss of an inner layer is therefore attached to that
layer's output: the output passes unchanged, and in the backward pass the loss receives its own gradient,

    d(total)/d(loss) = loss scale / number of micro-batches,

as the output loss does (the pattern of the engine's auxiliary losses). The values are collected on the stage that owns
the layer; `LayerLosses.collect` brings the means of all stages to every rank.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import merge_over_ranks


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.full_like(loss, LayerLosses.scale)


class LayerLosses:
    """Collects the attached losses of one step; one per process, as the engine's own loss trackers are."""

    scale: float = 1.0
    """Gradient given to every attached loss: loss scale / number of micro-batches. Set by the training step."""

    evaluating: bool = False
    """True while the loop evaluates: there the only pass has no gradients."""

    _sums: ClassVar[dict[str, torch.Tensor]] = {}
    _counts: ClassVar[dict[str, int]] = {}

    @classmethod
    def attach(cls, hidden_states: torch.Tensor, loss: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """Returns `hidden_states` unchanged; its backward pass also runs `loss`'s.

        Args:
            hidden_states: the layer's output [s, b, h].
            loss: scalar, the mean over this micro-batch; under sequence parallel this rank's part of it.
            name: what the value is logged under, for example `mlp_direct_loss/layer_3`; None to leave it out.
        """
        if name is not None:
            cls.record(name, loss)
        return _Attach.apply(hidden_states, loss)

    @classmethod
    def record(cls, name: str, value: torch.Tensor) -> None:
        """Logs a scalar of a layer, a mean over this micro-batch, that has no gradient."""
        # Recomputation runs a layer twice in training, first without gradients: count the pass that has them.
        if torch.is_grad_enabled() or cls.evaluating:
            total = cls._sums.get(name, torch.zeros((), device=value.device))
            cls._sums[name] = total + value.detach().float()
            cls._counts[name] = cls._counts.get(name, 0) + 1

    @classmethod
    def collect(cls) -> dict[str, float]:
        """Means over micro-batches and data-parallel ranks of all stages' values, by name; then forgets them.

        Collective over the pipeline and data-parallel groups: every rank calls it.
        """
        local = {name: float(total) / cls._counts[name] for name, total in cls._sums.items()}
        cls._sums, cls._counts = {}, {}
        merged = merge_over_ranks(local, parallel_state.get_pipeline_model_parallel_group())
        if not merged:
            return {}
        names = sorted(merged)
        values = torch.tensor([merged[name] for name in names], device=process_groups.device())
        data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(values, group=data_parallel)
        return dict(zip(names, (values / dist.get_world_size(data_parallel)).tolist(), strict=True))
