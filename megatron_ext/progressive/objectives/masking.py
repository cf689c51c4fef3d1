"""Which tokens of a sequence are masked: a deterministic function of (seed, sample id, epoch, stack).

A masked token is replaced by the mask token before the model sees it, so nothing of it leaks. A sequence with n tokens
that may be masked has round(fraction(t) n) of them masked, one at least, drawn without replacement: those with the
smallest of n uniform numbers. For one draw the masks of a later time hold those of an earlier one.

With the activation cache on, (seed, sample id) alone decide the draw: a sample has the same masks in every epoch.
Source: document 004.
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
    """Draws masks whose share grows with time."""

    def __init__(
        self, config: ProgressiveConfig | StackWiseConfig, *, seed: int = 1234, fixed: bool = False
    ) -> None:
        """Args:
        config: time and mask fractions.
        seed: of the masks.
        fixed: epoch and stack do not enter the draw; what the activation cache needs.
        """
        self.config = config.progressive_config() if isinstance(config, StackWiseConfig) else config
        self.seed = seed
        self.fixed = fixed

    def get_time_step_for_stack(self, stack_idx: int) -> int:
        """The time step of a stack under `depth`.

        Raises:
            ValueError: under `input` time is drawn for each sequence, or the custom mapping gives no time step.
        """
        if self.config.time_interpretation == "input":
            raise ValueError("--time-interpretation input: time belongs to a sequence, not to a stack")
        return time_step_of_stack(self.config, stack_idx)

    def generate_masks_for_stack(
        self, batch: Mapping[str, torch.Tensor] | torch.Tensor, stack_idx: int
    ) -> torch.Tensor:
        """The masks [b, s] of a batch, as `draw` gives them; a batch may also be its token ids alone."""
        return self.draw(batch if isinstance(batch, Mapping) else {"tokens": batch}, stack_idx).masks

    def draw(self, batch: Mapping[str, torch.Tensor], stack_idx: int) -> SampledMasks:
        """The masks of a micro-batch, on the device of its tokens.

        Args:
            batch: `tokens` (or `input_ids`) [b, s]; `loss_mask` [b, s], where it is there: a token at which it is 0
                is never masked; `epoch` [b], where it is there.
            stack_idx: the stack that trains, in the order in which stacks are made, from 0.
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
