"""Chooses the masked tokens of a sequence at random; the choice depends only on seed, sample id, epoch and stack.

A masked token is replaced by the mask token in the model's input, so that the model has no information about it. Of n
tokens that may be masked, max(1, round(fraction(t) n)) are masked, where t is the time step: every token gets a
uniform random number, and the tokens with the smallest numbers are chosen. With the same random numbers, the masks of
a later time step include those of an earlier one.

With the activation cache, the masks depend only on seed and sample id: a sample has the same masks in every epoch.
Source: docs/design/progressive_growth.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ext.data.datasets.sample_ids import digest, sample_ids
from megatron_ext.progressive.objectives.time_steps import mask_fraction, time_step_of_stack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.progressive.settings.stackwise_config import StackWiseConfig


@dataclass(frozen=True)
class SampledMasks:
    """The masks of a micro-batch."""

    masks: torch.Tensor
    """True where a token is masked, [b, s]."""

    time_steps: torch.Tensor
    """The time step of each sequence, integer [b]."""


class TimeStepMasking:
    """Chooses masked tokens at random; the fraction of masked tokens grows with the time step."""

    def __init__(
        self, config: ProgressiveConfig | StackWiseConfig, *, seed: int = 1234, fixed: bool = False
    ) -> None:
        """Args:
        config: contains the time steps and the mask fractions.
        seed: seed of the masks.
        fixed: whether a sample has the same masks in every epoch and for every stack, as the activation cache requires.
        """
        self.config = config.progressive_config() if isinstance(config, StackWiseConfig) else config
        self.seed = seed
        self.fixed = fixed

    def get_time_step_for_stack(self, stack_idx: int) -> int:
        """Returns the time step of a stack, which exists only with `--time-interpretation depth`.

        Raises:
            ValueError: `--time-interpretation` is `input`, or the custom mapping returns an invalid time step.
        """
        if self.config.time_interpretation == "input":
            raise ValueError(
                "the time step of a stack requires --time-interpretation depth (got input, with one "
                "time step per sequence)"
            )
        return time_step_of_stack(self.config, stack_idx)

    def generate_masks_for_stack(
        self, batch: Mapping[str, torch.Tensor] | torch.Tensor, stack_idx: int
    ) -> torch.Tensor:
        """Returns only the masks of `draw`, [b, s]; the batch may also be a tensor of token ids."""
        return self.draw(batch if isinstance(batch, Mapping) else {"tokens": batch}, stack_idx).masks

    def draw(self, batch: Mapping[str, torch.Tensor], stack_idx: int) -> SampledMasks:
        """Chooses the masks of a micro-batch, on the device of its tokens.

        Args:
            batch: contains `tokens` (or `input_ids`) [b, s], and optionally `loss_mask` [b, s] (tokens with 0 are never
                masked) and `epoch` [b].
            stack_idx: index of the stack that is trained, in the order of creation, from 0.
        """
        tokens = batch["tokens"] if "tokens" in batch else batch["input_ids"]
        rows, length = tokens.shape
        eligible = (
            batch["loss_mask"].cpu() != 0 if "loss_mask" in batch else tokens.new_ones(tokens.shape).cpu() > 0
        )
        epochs = batch["epoch"].tolist() if "epoch" in batch else [0] * rows
        numbers = torch.empty(rows, length + 1, dtype=torch.float64)
        for row, (sample, epoch) in enumerate(zip(sample_ids(tokens), epochs, strict=True)):
            generator = self._generator(sample, epoch, stack_idx)
            numbers[row] = torch.rand(length + 1, dtype=torch.float64, generator=generator)
        time_steps = self._time_steps(numbers[:, 0], stack_idx)
        counts = (mask_fraction(self.config, time_steps) * eligible.sum(1)).round().clamp(min=1)
        order = numbers[:, 1:].masked_fill(~eligible, 2.0).argsort(1).argsort(1)
        masks = (order < counts.unsqueeze(1)) & eligible
        return SampledMasks(masks.to(tokens.device), time_steps.to(tokens.device))

    def _generator(self, sample: bytes, epoch: int, stack_idx: int) -> torch.Generator:
        place = (0, 0) if self.fixed else (epoch, stack_idx)
        seed = digest([sample, *(number.to_bytes(8, "little") for number in (self.seed, *place))], size=8)
        return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)

    def _time_steps(self, uniform: torch.Tensor, stack_idx: int) -> torch.Tensor:
        if self.config.time_interpretation == "input":
            return (uniform * self.config.resolved_num_time_steps).long()
        return torch.full((len(uniform),), self.get_time_step_for_stack(stack_idx))
