"""Losses on the output of the last pipeline stage. The default is cross-entropy; a model family may replace it.

    loss of a step = sum(value * weight) / sum(weight)        over all tokens of the global batch

The weights of training tokens are the batch's `loss_mask`. A loss returns its sums over one micro-batch. `microbatches`
(for gradients) and `step_values` (for logged means) divide them by the sum of the global batch's weights. Therefore
neither depends on how the global batch is divided into micro-batches and data-parallel ranks.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from megatron_ext.models.gpt_model import GPTModel

Reads = Literal["losses", "logits", "hidden"]
"""Input of a loss: cross-entropies [b, s], logits [b, s, V/t], or the output layer's input [s, b, h]."""


class OutputLoss:
    """Cross-entropy; also the base class of other losses on the output."""

    reads: Reads = "losses"

    names: tuple[str, ...] = ("lm loss",)
    """Names of the logged values, in the same order on every stage."""

    factors: Mapping[str, float] = {"lm loss": 1.0}
    """Maps the name of each value that is part of the differentiated loss to its factor; the weights of these values
    must be the `loss_mask`.
    """

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of one micro-batch; called on the last stage.

        Args:
            model: the chunk that computed `output`, unwrapped.
            batch: the micro-batch.
            output: the model's output, of the kind that `reads` names.

        Returns:
            The scalar to differentiate, a weighted sum over the micro-batch's tokens; and for each of `names` a tensor
            [weighted sum, sum of weights], detached, float64.
        """
        found = self.of_tokens(model, batch, output)
        total = torch.zeros((), device=output.device)
        for name, factor in self.factors.items():
            values, weights = found[name]
            total = total + factor * (values.float() * weights.float()).sum()
        return total, {name: _sums(*pair) for name, pair in found.items()}

    def of_tokens(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns, for each of `names`, its values and weights per token, both [b, s]; arguments as for `__call__`."""
        return {"lm loss": (output, batch["loss_mask"])}


class NoLoss(OutputLoss):
    """A loss of zero, for passes that run only because layers compute or record values."""

    reads = "hidden"
    names = ()

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns a loss of zero, a scalar, and no values to log."""
        return output.new_zeros(()), {}


class HiddenStates(NoLoss):
    """Collects the output layer's inputs, [s, b, h] ([s/t, b, h] under sequence parallel), one per micro-batch."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Appends `output` to `values`; returns a scalar of zero and no values."""
        self.values.append(output)
        return super().__call__(model, batch, output)


def select_output_loss(brought: Iterable[OutputLoss | None]) -> OutputLoss:
    """Returns the output loss that one of the model families defines, or cross-entropy if none does.

    Raises:
        ValueError: two model families define an output loss.
    """
    losses = [loss for loss in brought if loss is not None]
    if len(losses) > 1:
        raise ValueError(
            "two model families define an output loss, but a run can have only one; train them separately"
        )
    return losses[0] if losses else OutputLoss()


def _sums(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns [weighted sum, sum of weights] in float64 for values and weights [b, s]."""
    weights = weights.detach().double()
    return torch.stack([(values.detach().double() * weights).sum(), weights.sum()])
