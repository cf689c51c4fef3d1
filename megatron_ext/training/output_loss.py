"""From the last stage's output to what is differentiated. The default is cross-entropy; a family may bring another.

loss of a micro-batch = sum(loss * mask) / sum(mask)
"""

from collections.abc import Iterable
from typing import Literal

import torch

from megatron_ext.models.gpt_model import GPTModel

Reads = Literal["losses", "logits", "hidden"]
"""What a loss is made of: cross-entropies [b, s], logits [b, s, V/t], or what the output layer reads, [s, b, h]."""


class OutputLoss:
    """Cross-entropy. Subclasses read something else."""

    reads: Reads = "losses"

    names: tuple[str, ...] = ("lm loss",)
    """What it gives for the log, in the same order on every stage."""

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Called on the last stage for every micro-batch.

        Args:
            model: the chunk that made the output, unwrapped.
            batch: the micro-batch.
            output: as `reads` says.

        Returns:
            The scalar to differentiate, and a detached scalar for each of `names`: means over the micro-batch.
        """
        means = {name: masked_mean(*pair) for name, pair in self.of_tokens(model, batch, output).items()}
        return means["lm loss"], {name: value.detach().clone() for name, value in means.items()}

    def of_tokens(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What a loss for evaluations has for every token: values and weights [b, s] for each of `names`.

        The arguments are those of a call, which gives the means.
        """
        return {"lm loss": (output, batch["loss_mask"])}


class HiddenStates(OutputLoss):
    """No loss: keeps what the output layer would read, [s, b, h] ([s/t, b, h]), in the order of micro-batches."""

    reads = "hidden"
    names = ()

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def __call__(
        self, model: GPTModel, batch: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `OutputLoss`; the scalar is zero."""
        self.values.append(output)
        return output.new_zeros(()), {}


def the_one(brought: Iterable[OutputLoss | None]) -> OutputLoss:
    """The loss that one of the families brings, or cross-entropy.

    Raises:
        ValueError: two bring one.
    """
    losses = [loss for loss in brought if loss is not None]
    if len(losses) > 1:
        raise ValueError("two families bring an output loss; a run has one")
    return losses[0] if losses else OutputLoss()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [b, s] where `mask` [b, s] is not 0, in fp32."""
    mask = mask.reshape(-1).float()
    return (values.reshape(-1).float() * mask).sum() / mask.sum().clamp(min=1.0)
