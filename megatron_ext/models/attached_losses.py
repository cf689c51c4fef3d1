"""Per-layer losses that work on any pipeline stage.

megatron-core calls the loss function on the last stage only. The loss of an inner layer is therefore attached to that
layer's output: the output passes through unchanged, and in the backward pass the loss gets the gradient

    d(total)/d(loss) = loss scale / number of micro-batches,

which the output loss gets too. This is the pattern of the engine's `MoEAuxLossAutoScaler`. The stage that owns the
layer records the value; `LayerLosses.collect` returns the means of all stages on every rank.
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
    """Attaches losses to layer outputs and records the losses' values; state is kept in the class, once per process.

    Layers deep in the model record here without a reference to the training step, as with the engine's own trackers.
    """

    scale: float = 1.0
    """Gradient that every attached loss gets: loss scale / number of micro-batches. The training step sets it."""

    evaluating: bool = False
    """True while the loop evaluates; `record` then also counts passes without gradients."""

    _sums: ClassVar[dict[str, torch.Tensor]] = {}
    _counts: ClassVar[dict[str, int]] = {}

    @classmethod
    def attach(cls, hidden_states: torch.Tensor, loss: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """Returns `hidden_states` unchanged, with the backward pass of `loss` attached.

        Args:
            hidden_states: the layer's output, [s, b, h].
            loss: scalar, the mean over this micro-batch (under context parallelism over this rank's part of it); under
                sequence parallelism this rank's share of that mean.
            name: tag for logging, for example `mlp_direct_loss/layer_3`; None logs nothing.
        """
        if name is not None:
            cls.record(name, loss)
        return _Attach.apply(hidden_states, loss)

    @classmethod
    def record(cls, name: str, value: torch.Tensor) -> None:
        """Records a scalar without gradient under the tag `name`; `value` is a mean over the tokens as in `attach`."""
        # With activation recomputation a layer runs twice, first without gradients: count only the second run.
        if torch.is_grad_enabled() or cls.evaluating:
            total = cls._sums.get(name, torch.zeros((), device=value.device))
            cls._sums[name] = total + value.detach().float()
            cls._counts[name] = cls._counts.get(name, 0) + 1

    @classmethod
    def collect(cls) -> dict[str, float]:
        """Returns every recorded value, averaged over micro-batches and data-parallel ranks, and clears the records.

        Collective over the pipeline and data-parallel groups: every rank must call it, and every rank gets all values.
        """
        local = {name: float(total) / cls._counts[name] for name, total in cls._sums.items()}
        cls._sums, cls._counts = {}, {}
        merged = merge_over_ranks(local, parallel_state.get_pipeline_model_parallel_group())
        if not merged:
            return {}
        # Sorted: the reduction below adds by position, and ranks may have recorded in different order.
        names = sorted(merged)
        values = torch.tensor([merged[name] for name in names], device=process_groups.device())
        data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(values, group=data_parallel)
        return dict(zip(names, (values / dist.get_world_size(data_parallel)).tolist(), strict=True))
