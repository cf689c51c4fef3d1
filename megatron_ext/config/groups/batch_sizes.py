"""The global batch size of every step, which may grow (--rampup-batch-size, --step-batch-size-schedule).

    size(consumed) = START + INCREMENT * floor(consumed / (SAMPLES / n))     n = (global batch size - START) / INCREMENT
    size(consumed) = global batch size                                       after SAMPLES samples

The formula is that of megatron-core's calculator. This implementation needs no process group, so that flags can be
checked and a run can be planned before torch is imported. The schedule (in megatron-core from 0.18 on) gives a size
for each range of consumed samples:

    size(consumed) = SIZE of the last entry whose THRESHOLD is at most consumed
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

_ENDINGS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_IN_SAMPLES = "samples"


def read_schedule(words: Sequence[str], seq_length: int = 1) -> tuple[tuple[int, int], ...]:
    """Returns the entries of --step-batch-size-schedule as (threshold in samples, sequences per step).

    Args:
        words: entries such as `2.4B:320`; the threshold is in tokens, or in samples if it ends in `samples`.
        seq_length: tokens per sample.

    Raises:
        ValueError: an entry is not valid, or the thresholds do not rise from 0.
    """
    given, steps = f"--step-batch-size-schedule {' '.join(words)}", []
    for entry in " ".join(words).replace(",", " ").strip("'\" ").split():
        found = re.fullmatch(rf"(\d+|\d*\.\d+)([KMBT]?)({_IN_SAMPLES})?:([1-9]\d*)", entry)
        if found is None:
            raise ValueError(f"{given}: {entry} must be THRESHOLD:SIZE, such as 2.4B:320")
        number, ending, counts_samples, size = found.groups()
        threshold = int(float(number) * _ENDINGS[ending])
        steps.append((threshold if counts_samples else threshold // seq_length, int(size)))
    thresholds = [threshold for threshold, _ in steps]
    if thresholds[:1] != [0] or any(a >= b for a, b in pairwise(thresholds)):
        raise ValueError(f"{given}: the thresholds must begin with 0 and rise by at least one sequence")
    return tuple(steps)


def in_samples(words: Sequence[str], seq_length: int) -> tuple[str, ...]:
    """Returns the entries of --step-batch-size-schedule with all thresholds in samples."""
    return tuple(f"{threshold}{_IN_SAMPLES}:{size}" for threshold, size in read_schedule(words, seq_length))


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run; the size of a step depends on the number of samples consumed before it."""

    final: int
    """Sequences per step, after the ramp if there is one."""

    ramp: tuple[int, ...] | None = None
    """The values of --rampup-batch-size: START, INCREMENT, SAMPLES; None without a ramp."""

    steps: tuple[tuple[int, int], ...] = ()
    """The entries of --step-batch-size-schedule, as `read_schedule` returns them; empty without a schedule."""

    def at(self, consumed_samples: int) -> int:
        """Returns the number of sequences in the step that begins after `consumed_samples` sequences."""
        if self.steps:
            return self.steps[bisect_right(self.steps, consumed_samples, key=lambda step: step[0]) - 1][1]
        if self.ramp is None:
            return self.final
        start, increment, samples = self.ramp
        if consumed_samples > samples:
            return self.final
        return start + int(consumed_samples / (samples / ((self.final - start) // increment))) * increment

    def samples_in(self, steps: int, consumed_samples: int = 0) -> int:
        """Returns the number of sequences in the `steps` steps that follow the first `consumed_samples` sequences."""
        growing = list(islice(self._growing(consumed_samples), steps))
        return sum(growing) + (steps - len(growing)) * self.final

    def steps_in(self, samples: int, consumed_samples: int = 0) -> int:
        """Returns the number of whole steps in the `samples` sequences that follow the first `consumed_samples`."""
        steps = 0
        for size in self._growing(consumed_samples):
            if size > samples:
                return steps
            samples, steps = samples - size, steps + 1
        return steps + samples // self.final

    def steps_of_ramp(self) -> int:
        """Returns the number of steps until the size reaches its final value."""
        return sum(1 for _ in self._growing(0))

    def sizes(self) -> list[int]:
        """Returns the distinct sizes of the steps, in the order in which they occur."""
        return list(dict.fromkeys([*self._growing(0), self.final]))

    def _growing(self, consumed_samples: int) -> Iterator[int]:
        """Yields the size of every step until the size reaches its final value."""
        while not self._is_final(consumed_samples):
            yield (size := self.at(consumed_samples))
            consumed_samples += size

    def _is_final(self, consumed_samples: int) -> bool:
        if self.steps:
            return consumed_samples >= self.steps[-1][0]
        return self.at(consumed_samples) == self.final
