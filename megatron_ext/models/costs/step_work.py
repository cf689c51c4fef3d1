"""Describes which part of the base model's forward and backward passes a training step runs if layers are frozen.

For each use of a layer, the table marks the computed parts (x). The last two columns are the FLOPs, in units of one
forward pass, of the products with weights and of core attention:

    use         forward   gradient of inputs   gradient of weights     weights   attention
    SKIPPED                                                            0         0
    FORWARD     x                                                      1         1
    PARTIAL     x         in part; the model family counts it           1         1
    GRADIENT    x         x                                            2         3
    TRAINED     x         x                    x                       3         3

Core attention has no weights: its two products have two input gradients each. A trained layer always needs the gradient
of its inputs, because its norms train. A model family that freezes parts of the model returns a `StepWork`,
which `model_cost` and `memory_estimate` read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Use(IntEnum):
    """A step's use of a layer, or of the head (final norm and output layer), in increasing order of work; see the table
    at the top of this file.
    """

    SKIPPED = 0
    FORWARD = 1
    PARTIAL = 2
    GRADIENT = 3
    TRAINED = 4

    @property
    def weight_passes(self) -> int:
        """FLOPs of the products with weights, in units of one forward pass."""
        return (0, 1, 1, 2, 3)[self]

    @property
    def attention_passes(self) -> int:
        """FLOPs of core attention, in units of one forward pass."""
        return (0, 1, 1, 3, 3)[self]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The parts of the model that one training step runs and trains."""

    layers: tuple[Use, ...]
    """A step's use of each layer of the base model, from the first to the last."""

    head: Use = Use.TRAINED
    """A step's use of the final norm and the output layer."""

    trains_embedding: bool = True
    """Whether the word and position embeddings are trained."""

    head_forwards: int = 1
    """Number of forward passes of the head (final norm and output layer): 0 if no loss reads the output, 2 if a
    teacher's output is computed as well.
    """

    further_forwards: int = 0
    """Number of additional forward passes of all layers without the head, for example those of a teacher."""

    trained_parameters: int = 0
    """Number of the model family's own parameters that are trained."""

    flops_per_token: float = 0.0
    """FLOPs per token of the model family's own matrix products, forward and backward."""

    @property
    def passes_of_layers(self) -> list[tuple[int, int]]:
        """FLOPs of each layer, in units of its forward pass: (products with weights, core attention)."""
        more = self.further_forwards
        return [(use.weight_passes + more, use.attention_passes + more) for use in self.layers]

    @property
    def head_passes(self) -> int:
        """FLOPs of the output layer in a training step, in units of its own forward pass."""
        return self.head_forwards + self.head.weight_passes - 1 if self.head_forwards else 0


def merged_work(works: Sequence[StepWork]) -> StepWork | None:
    """Combines the work that several model families describe; a part is frozen if at least one family freezes it.

    Returns None if no family describes its work; then everything trains.
    """
    if not works:
        return None
    return StepWork(
        layers=tuple(map(min, zip(*(work.layers for work in works), strict=True))),
        head=min(work.head for work in works),
        trains_embedding=all(work.trains_embedding for work in works),
        head_forwards=1 + sum(work.head_forwards - 1 for work in works),
        further_forwards=sum(work.further_forwards for work in works),
    )
