"""Per-layer losses that work on any pipeline stage.

megatron-core calls the loss function on the last stage only. The loss of an inner layer is therefore attached to that
layer's output: the output passes through unchanged, and in the backward pass the loss gets the gradient

    d(total)/d(loss) = loss scale / number of micro-batches,

which the output loss gets too. The engine's `MoEAuxLossAutoScaler` works in the same way. The stage that owns the
layer records the loss's value; the training step reduces the values of all stages (`training.engine.step_values`).
"""

from typing import Any, ClassVar

import torch


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
    """Attaches losses to layer outputs and records the losses' values.

    All state is in class attributes, once per process, so that layers deep in the model can record values without a
    reference to the training step. The engine's own trackers work in the same way.
    """

    scale: float = 1.0
    """Gradient that every attached loss gets: loss scale / number of micro-batches. The training step sets it."""

    loss_scale: float = 1.0
    """Loss scale of --fp16. All gradients contain it as a factor until the optimizer divides it out. 1 without --fp16.
    The training step sets it.
    """

    evaluating: bool = False
    """True while the loop evaluates; `record` then also counts passes without gradients."""

    _sums: ClassVar[dict[str, torch.Tensor]] = {}
    _counts: ClassVar[dict[str, int]] = {}

    @classmethod
    def attach(cls, hidden_states: torch.Tensor, loss: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """Returns `hidden_states` unchanged, with the backward pass of `loss` attached.

        Args:
            hidden_states: the layer's output, [s, b, h].
            loss: scalar, the mean over this micro-batch. Under context parallelism, the mean over this rank's part of
                the micro-batch; under sequence parallelism, this rank's share of the mean.
            name: tag for logging, for example `mlp_direct_loss/layer_3`; None logs nothing.
        """
        if name is not None:
            cls.record(name, loss)
        return _Attach.apply(hidden_states, loss)

    @classmethod
    def record(cls, name: str, value: torch.Tensor) -> None:
        """Records a scalar without gradient under the tag `name`; `value` is a mean over the tokens as in `attach`."""
        # With activation recomputation, a layer runs twice, first without gradients; count only the second run.
        if torch.is_grad_enabled() or cls.evaluating:
            value = value.detach().float()
            cls._sums[name] = cls._sums[name] + value if name in cls._sums else value
            cls._counts[name] = cls._counts.get(name, 0) + 1

    @classmethod
    def take(cls) -> dict[str, torch.Tensor]:
        """Returns this rank's recorded values, each averaged over its micro-batches, and clears the records.

        The values are fp32 scalars on the device; a layer's values are recorded by the stage that owns the layer.
        """
        if not cls._sums:
            return {}
        # Divide by Python numbers, which need no copy to the device.
        means = torch._foreach_div(list(cls._sums.values()), [float(count) for count in cls._counts.values()])
        found = dict(zip(cls._sums, means, strict=True))
        cls._sums, cls._counts = {}, {}
        return found
