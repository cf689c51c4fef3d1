"""From the last stage's output to what is differentiated. The default is cross-entropy; a family may bring another.

loss of a micro-batch = sum(loss * mask) / sum(mask)
"""

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
        loss = masked_mean(output, batch["loss_mask"])
        return loss, {"lm loss": loss.detach().clone()}


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


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [b, s] where `mask` [b, s] is not 0, in fp32."""
    mask = mask.reshape(-1).float()
    return (values.reshape(-1).float() * mask).sum() / mask.sum().clamp(min=1.0)
