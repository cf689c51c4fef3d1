"""What a training step does with the base model if not everything trains.

    use         forward   gradient of inputs   gradient of weights     passes: products with weights, core attention
    SKIPPED                                                            0       0
    FORWARD     x                                                      1       1
    PARTIAL     x         counted by the family                        1       1
    GRADIENT    x         x                                            2       3
    TRAINED     x         x                    x                       3       3

Core attention has no weights: its two products have two gradients each. A layer that trains always needs the gradient
of its inputs, since its norms train. A family that freezes something returns a `StepWork`, which `model_cost` and
`memory_estimate` use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Use(IntEnum):
    """What a step does with a layer, or with the head (final norm and output layer); more is larger."""

    SKIPPED = 0
    FORWARD = 1
    PARTIAL = 2
    GRADIENT = 3
    TRAINED = 4

    @property
    def weight_passes(self) -> int:
        """FLOPs of products with weights, as a multiple of the forward pass."""
        return (0, 1, 1, 2, 3)[self]

    @property
    def attention_passes(self) -> int:
        """FLOPs of core attention, as a multiple of the forward pass."""
        return (0, 1, 1, 3, 3)[self]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one training step of a family does."""

    layers: tuple[Use, ...]
    """Use of each layer of the base model."""

    head: Use = Use.TRAINED
    """Use of the final norm and the output layer."""

    trains_embedding: bool = True
    """Whether word and position embedding train."""

    head_forwards: int = 1
    """Forward passes of the head: 0 if no loss reads the output, 2 if a loss compares it with a teacher's."""

    further_forwards: int = 0
    """Additional forward passes of all layers, without the head: those of a teacher."""

    trained_parameters: int = 0
    """Number of the family's own parameters that train."""

    flops_per_token: float = 0.0
    """FLOPs per token, forward and backward, of the matrix products that the family adds."""

    @property
    def layer_passes(self) -> tuple[int, int]:
        """FLOPs of products with weights, and of core attention, as multiples of one layer's forward pass."""
        further = self.further_forwards * len(self.layers)
        of_weights = sum(use.weight_passes for use in self.layers)
        return of_weights + further, sum(use.attention_passes for use in self.layers) + further

    @property
    def head_passes(self) -> int:
        """FLOPs of the output layer, as a multiple of its forward pass."""
        return self.head_forwards + self.head.weight_passes - 1 if self.head_forwards else 0


def merged_work(works: Sequence[StepWork]) -> StepWork | None:
    """Combines the work of several families on the base model; None if everything trains.

    What one family freezes is frozen.
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
