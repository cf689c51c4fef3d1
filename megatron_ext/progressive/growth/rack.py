"""Racks and stacks: assigns a model's layers to stacks, and maps layer numbers when the model grows.

These words have the following meaning:

    block    one transformer layer
    stack    `n_blocks` blocks that are created and trained together; stacks are numbered from 0 as they are created
    rack     the whole model: embedding, stacks, final norm, head

`Rack` lists the stacks in the order from the embedding to the head. Source: docs/design/progressive_growth.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack: layers that are created and trained together."""

    index: int
    """Index of the stack in the order of creation, from 0."""

    n_blocks: int
    """Number of layers."""

    precision: str
    """Precision of the linear layers: full, half, bfloat16, nvfp4 or qlora."""


@dataclass(frozen=True, kw_only=True)
class Rack:
    """The stacks of a model, in the order from the embedding to the head."""

    stacks: tuple[Stack, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return sum(stack.n_blocks for stack in self.stacks)

    @property
    def newest(self) -> Stack:
        """The stack that was created last."""
        return max(self.stacks, key=lambda stack: stack.index)

    def grown(self, mode: str, n_blocks: int, precision: str) -> "Rack":
        """Returns a rack with one more stack.

        Args:
            mode: position of the new stack: `append` (after all others) or `prepend` (before all others).
            n_blocks: number of layers of the new stack.
            precision: precision of the new stack.
        """
        stack = Stack(index=len(self.stacks), n_blocks=n_blocks, precision=precision)
        return Rack(stacks=(stack, *self.stacks) if mode == "prepend" else (*self.stacks, stack))

    def first(self, num_stacks: int) -> "Rack":
        """Returns the rack of only the `num_stacks` stacks that were created first."""
        return Rack(stacks=tuple(stack for stack in self.stacks if stack.index < num_stacks))

    def layers(self) -> Iterator[tuple[Stack, range]]:
        """Yields every stack with the range of its layer numbers, counted from 0 over the whole model."""
        first = 0
        for stack in self.stacks:
            yield stack, range(first, first + stack.n_blocks)
            first += stack.n_blocks

    def layers_of(self, index: int) -> range:
        """Returns the layer numbers of the stack with this index."""
        return next(layers for stack, layers in self.layers() if stack.index == index)

    def layers_of_other(self, other: "Rack") -> dict[int, int]:
        """Maps layer numbers in this rack to layer numbers in the rack `other`, for the layers that both racks have."""
        there = {
            (stack.index, place): layer
            for stack, layers in other.layers()
            for place, layer in enumerate(layers)
        }
        return {
            layer: there[stack.index, place]
            for stack, layers in self.layers()
            for place, layer in enumerate(layers)
            if (stack.index, place) in there
        }

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the rack as JSON values, which `from_json` reads."""
        return [
            {"index": stack.index, "n_blocks": stack.n_blocks, "precision": stack.precision}
            for stack in self.stacks
        ]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> "Rack":
        """Rebuilds a rack from the result of `as_json()`."""
        return cls(stacks=tuple(Stack(**stack) for stack in value))


def rack_of(config: ProgressiveConfig, num_stacks: int) -> Rack:
    """Returns the rack with the first `num_stacks` of the stacks that a configuration describes."""
    rack = Rack()
    for index in range(num_stacks):
        mode = config.mode_of(index) if index else "append"
        rack = rack.grown(mode, config.blocks_of(index), config.precision_of(index))
    return rack
