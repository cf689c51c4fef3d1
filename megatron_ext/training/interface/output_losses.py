"""From the last stage's output to what is differentiated. The default is cross-entropy; a family may bring another.

    loss of a step = sum(value * weight) / sum(weight)        over all tokens of the global batch

The weights of training tokens are the batch's `loss_mask`. A loss gives its sums for one micro-batch; the division by
the global batch's weights is in `schedule` for gradients and in `step` for logged means, so that neither depends on
how the global batch is divided into micro-batches and data-parallel ranks.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from megatron_ext.models.gpt_model import GPTModel

Reads = Literal["losses", "logits", "hidden"]
"""What a loss is made of: cross-entropies [b, s], logits [b, s, V/t], or what the output layer reads, [s, b, h]."""


class OutputLoss:
    """Cross-entropy. Subclasses read something else."""

    reads: Reads = "losses"

    names: tuple[str, ...] = ("lm loss",)
    """The values that are logged, in the same order on every stage."""

    factors: Mapping[str, float] = {"lm loss": 1.0}
    """The values that are differentiated, and the factor of each; their tokens' weights are the `loss_mask`."""

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Called on the last stage for every micro-batch.

        Args:
            model: the chunk that made the output, unwrapped.
            batch: the micro-batch.
            output: as `reads` says.

        Returns:
            The scalar to differentiate, a weighted sum over the micro-batch's tokens; and for each of `names` the
            pair [weighted sum, sum of weights], detached, float64.
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
        """Values and weights [b, s] of every token for each of `names`; the arguments are those of a call."""
        return {"lm loss": (output, batch["loss_mask"])}


class NoLoss(OutputLoss):
    """No loss: the pass is for what happens on the way."""

    reads = "hidden"
    names = ()

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `OutputLoss`; the scalar is zero."""
        return output.new_zeros(()), {}


class HiddenStates(NoLoss):
    """Keeps what the output layer would read, [s, b, h] ([s/t, b, h]), in the order of micro-batches."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `NoLoss`."""
        self.values.append(output)
        return super().__call__(model, batch, output)


def select_output_loss(brought: Iterable[OutputLoss | None]) -> OutputLoss:
    """The loss that one of the families brings, or cross-entropy.

    Raises:
        ValueError: two bring one.
    """
    losses = [loss for loss in brought if loss is not None]
    if len(losses) > 1:
        raise ValueError("two families bring an output loss; a run has one")
    return losses[0] if losses else OutputLoss()


def _sums(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[weighted sum, sum of weights] of values and weights [b, s], float64."""
    weights = weights.detach().double()
    return torch.stack([(values.detach().double() * weights).sum(), weights.sum()])
