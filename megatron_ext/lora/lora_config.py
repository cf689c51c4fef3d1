"""Flags that choose the LoRA adapters of each stack (a group of layers of a growing model), with their rank and
alpha.

A stack has at most two adapters, which add up (dual LoRA, docs/design/progressive_growth.md):

    stack         created with the stack
    progressive   a smaller adapter, created when the next stack is added and this stack becomes part of the trunk

The flag --qlora-strategy selects how rank and alpha of the stack adapters are chosen:

    simplified    every stack has the same rank r and alpha
    progressive   rank and alpha each follow a pattern over the stack's index i, from 0:
                  constant r    increasing r 2^i    decreasing max(1, r // 2^i)    linear r + 8 i
    variable      a list of `stack:rank:alpha`
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_choices,
    check_positive,
    flag_name,
)

STACK = "stack"
PROGRESSIVE = "progressive"
"""Names of a stack's two adapters."""

Pattern = Literal["constant", "increasing", "decreasing", "linear"]


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Rank and alpha of one adapter."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor alpha / rank by which the adapter's product B A x is multiplied."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Flags for LoRA adapters on every linear layer of a stack; the defaults follow
    docs/design/progressive_growth.md.
    """

    qlora_enabled: bool = True
    """Add LoRA adapters to every new stack."""

    qlora_rank: int = 16
    """Rank of the stack adapters; with --qlora-strategy progressive, the rank of stack 0."""

    qlora_alpha: float = 32
    """Alpha of the stack adapters; their output is scaled by alpha / rank."""

    qlora_strategy: Literal["simplified", "progressive", "variable"] = "simplified"
    """How rank and alpha of each stack are chosen: equal for all stacks (simplified), by a pattern over the stacks
    (progressive), or from a list (variable).
    """

    qlora_rank_pattern: Pattern | None = None
    """Pattern of the ranks with --qlora-strategy progressive. The rank of stack i is r (constant), r*2^i (increasing,
    the default), r/2^i but at least 1 (decreasing), or r+8i (linear), where r is --qlora-rank.
    """

    qlora_alpha_pattern: Pattern | None = None
    """Pattern of the alphas with --qlora-strategy progressive, as for --qlora-rank-pattern. Default: constant."""

    qlora_configs: str | None = None
    """Rank and alpha with --qlora-strategy variable: stack:rank:alpha for every stack, such as 0:8:16,1:16:32."""

    progressive_qlora: bool = True
    """Add a second, smaller adapter to a stack when it becomes part of the trunk."""

    progressive_qlora_rank: int = 8
    """Rank of the adapters that --progressive-qlora adds."""

    progressive_qlora_alpha: float = 16
    """Alpha of the adapters that --progressive-qlora adds."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "qlora_rank", "progressive_qlora_rank")
        check_positive(self, "qlora_alpha", "progressive_qlora_alpha")
        for name, strategy in (
            ("qlora_rank_pattern", "progressive"),
            ("qlora_alpha_pattern", "progressive"),
            ("qlora_configs", "variable"),
        ):
            value = getattr(self, name)
            if value is not None and self.qlora_strategy != strategy:
                raise ValueError(
                    f"{flag_name(name)} {value}: requires --qlora-strategy {strategy} (got {self.qlora_strategy})"
                )
        if self.qlora_strategy == "variable":
            self._listed()

    def check_stacks(self, num_stacks: int) -> None:
        """Checks that --qlora-configs lists at least `num_stacks` stacks.

        Raises:
            ValueError: --qlora-configs lists fewer stacks.
        """
        if self.qlora_enabled and self.qlora_strategy == "variable" and len(self._listed()) < num_stacks:
            raise ValueError(
                f"--qlora-configs {self.qlora_configs}: lists {len(self._listed())} stacks, but the model has "
                f"{num_stacks}; add the missing ones"
            )

    def stack_adapter(self, stack_idx: int) -> AdapterShape:
        """Returns rank and alpha of the stack adapter of stack `stack_idx`, counted from 0.

        Raises:
            ValueError: --qlora-configs does not list the stack.
        """
        if self.qlora_strategy == "variable":
            self.check_stacks(stack_idx + 1)
            return self._listed()[stack_idx]
        if self.qlora_strategy == "simplified":
            return AdapterShape(rank=self.qlora_rank, alpha=self.qlora_alpha)
        rank = _follow(self.qlora_rank_pattern or "increasing", self.qlora_rank, stack_idx)
        alpha = _follow(self.qlora_alpha_pattern or "constant", self.qlora_alpha, stack_idx)
        return AdapterShape(rank=int(rank), alpha=alpha)

    def progressive_adapter(self) -> AdapterShape:
        """Returns rank and alpha of the second adapter of the trunk's stacks."""
        return AdapterShape(rank=self.progressive_qlora_rank, alpha=self.progressive_qlora_alpha)

    def adapters(self, stack_idx: int, *, in_trunk: bool) -> dict[str, AdapterShape]:
        """Returns a stack's adapters as a mapping from adapter name to rank and alpha.

        Args:
            stack_idx: index of the stack in the order of creation, from 0.
            in_trunk: whether the stack belongs to the trunk, that is, another stack was added after it.
        """
        found = {}
        if self.qlora_enabled:
            found[STACK] = self.stack_adapter(stack_idx)
            if in_trunk and self.progressive_qlora:
                found[PROGRESSIVE] = self.progressive_adapter()
        return found

    def _listed(self) -> list[AdapterShape]:
        return _parse(self.qlora_configs or "")


def _follow(pattern: Pattern, first: float, index: int) -> float:
    if pattern == "increasing":
        return first * 2**index
    if pattern == "decreasing":
        return max(1, first // 2**index)
    return first + 8 * index if pattern == "linear" else first


def _parse(text: str) -> list[AdapterShape]:
    shapes: dict[int, AdapterShape] = {}
    for part in text.split(","):
        try:
            stack, rank, alpha = part.split(":")
            number, shape = int(stack), AdapterShape(rank=int(rank), alpha=float(alpha))
        except ValueError:
            raise ValueError(
                f"--qlora-configs {text}: must be a comma-separated list of stack:rank:alpha, such as 0:8:16,1:16:32"
            ) from None
        if number in shapes:
            raise ValueError(f"--qlora-configs {text}: lists stack {number} twice")
        if shape.rank < 1 or not shape.alpha > 0:
            raise ValueError(
                f"--qlora-configs {text}: stack {number} has rank {shape.rank}, alpha {shape.alpha:g}; "
                "the rank must be at least 1, and alpha above 0"
            )
        shapes[number] = shape
    if sorted(shapes) != list(range(len(shapes))):
        raise ValueError(
            f"--qlora-configs {text}: must list every stack from 0 on, but lists {sorted(shapes)}"
        )
    return [shapes[number] for number in range(len(shapes))]
