"""The global batch size of every step, which --rampup-batch-size lets grow.

    size(consumed) = START + INCREMENT * floor(consumed / (SAMPLES / n))     n = (global batch size - START) / INCREMENT
    size(consumed) = global batch size                                       after SAMPLES samples

This is the rule of megatron-core's calculator; here it needs no process group, so that flags can be checked and a run
can be planned before torch is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run; the size of a step depends on the number of samples consumed before it."""

    final: int
    """Sequences per step, after the ramp if there is one."""

    ramp: tuple[int, ...] | None = None
    """The values of --rampup-batch-size: START, INCREMENT, SAMPLES; None for a constant size."""

    def at(self, consumed_samples: int) -> int:
        """Returns the number of sequences in the step that begins after `consumed_samples` sequences."""
        if self.ramp is None:
            return self.final
        start, increment, samples = self.ramp
        if consumed_samples > samples:
            return self.final
        return start + int(consumed_samples / (samples / ((self.final - start) // increment))) * increment

    def samples_in(self, steps: int, consumed_samples: int = 0) -> int:
        """Returns the number of sequences in `steps` steps that begin after `consumed_samples` sequences."""
        growing = list(islice(self._growing(consumed_samples), steps))
        return sum(growing) + (steps - len(growing)) * self.final

    def steps_in(self, samples: int, consumed_samples: int = 0) -> int:
        """Returns the number of whole steps in `samples` sequences that follow `consumed_samples` sequences."""
        steps = 0
        for size in self._growing(consumed_samples):
            if size > samples:
                return steps
            samples, steps = samples - size, steps + 1
        return steps + samples // self.final

    def steps_of_ramp(self) -> int:
        """Returns the number of steps before the first step of the final size."""
        return sum(1 for _ in self._growing(0))

    def _growing(self, consumed_samples: int) -> Iterator[int]:
        """Yields the sizes of the steps up to the first of the final size."""
        while (size := self.at(consumed_samples)) != self.final:
            yield size
            consumed_samples += size
