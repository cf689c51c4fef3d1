"""What a training step does with the base model where not everything trains.

    use         forward   gradient of inputs   gradient of weights     passes: products with weights, core attention
    SKIPPED                                                            0       0
    FORWARD     x                                                      1       1
    PARTIAL     x         what the family counts as its own            1       1
    GRADIENT    x         x                                            2       3
    TRAINED     x         x                    x                       3       3

Core attention has no weights: its two products have two gradients each. A layer that trains needs the gradient of its
inputs in any case, since its norms train. A family that freezes something says so with a `StepWork`, by which
`models.accounting` and `models.memory_estimate` count.
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
        """FLOPs of products with weights, in those of a forward pass."""
        return (0, 1, 1, 2, 3)[self]

    @property
    def attention_passes(self) -> int:
        """FLOPs of core attention, in those of a forward pass."""
        return (0, 1, 1, 3, 3)[self]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One training step, as a family makes it."""

    layers: tuple[Use, ...]
    """Of the base model, all layers."""

    head: Use = Use.TRAINED
    """Final norm and output layer."""

    trains_embedding: bool = True
    """Word and position embedding."""

    head_forwards: int = 1
    """Forward passes of the head: 0 where no loss reads the output, 2 where a teacher's is compared."""

    further_forwards: int = 0
    """Forward passes of all layers, without the head, beside the one that trains: a teacher's."""

    trained_parameters: int = 0
    """Of the family's own parameters."""

    flops_per_token: float = 0.0
    """FLOPs of the matrix products, forward and backward, that the family adds."""

    @property
    def layer_passes(self) -> tuple[int, int]:
        """Passes of products with weights and of core attention, in those of one layer's forward pass."""
        further = self.further_forwards * len(self.layers)
        of_weights = sum(use.weight_passes for use in self.layers)
        return of_weights + further, sum(use.attention_passes for use in self.layers) + further

    @property
    def head_passes(self) -> int:
        """Passes of the output layer, in forward passes."""
        return self.head_forwards + self.head.weight_passes - 1 if self.head_forwards else 0


def merged_work(works: Sequence[StepWork]) -> StepWork | None:
    """What a step does with the base model where several families take part; None where everything trains.

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
