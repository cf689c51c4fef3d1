"""What a user chooses about LoRA: which adapters a stack gets, and their rank and alpha.

Two adapters a stack at most, which add up (document 004's dual LoRA):

    stack         on each stack, made with it
    progressive   smaller, on every stack of the trunk, made at the first growth after it

    simplified    every stack has the same rank r and alpha
    progressive   both follow a pattern over the stack's index i, from 0:
                  constant r    increasing r 2^i    decreasing max(1, r // 2^i)    linear r + 8 i
    variable      a list: `stack:rank:alpha`
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
"""Names of the two adapters."""

Pattern = Literal["constant", "increasing", "decreasing", "linear"]


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Rank and alpha of one adapter; its product is scaled by alpha / rank."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor on B A x."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA adapters on every linear layer of a stack; document 004's keys and defaults."""

    qlora_enabled: bool = True
    """Give each stack LoRA adapters as it is made."""

    qlora_rank: int = 16
    """Rank of the stack adapters, of stack 0 under the strategy progressive."""

    qlora_alpha: float = 32
    """Their alpha: the adapter's output is scaled by alpha / rank."""

    qlora_strategy: Literal["simplified", "progressive", "variable"] = "simplified"
    """How rank and alpha follow from the stack: the same for all, by a pattern, or as listed."""

    qlora_rank_pattern: Pattern | None = None
    """Strategy progressive: constant, increasing (r*2^i, default), decreasing (r/2^i, at least 1), linear (r+8i)."""

    qlora_alpha_pattern: Pattern | None = None
    """Strategy progressive: the same for alpha; constant by default."""

    qlora_configs: str | None = None
    """Strategy variable: stack:rank:alpha for every stack from 0, as 0:8:16,1:16:32,2:32:64."""

    progressive_qlora: bool = True
    """Give every stack of the trunk a second, smaller adapter when a stack is added to it."""

    progressive_qlora_rank: int = 8
    """Rank of these adapters."""

    progressive_qlora_alpha: float = 16
    """Their alpha."""

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
                    f"{flag_name(name)} {value}: is for --qlora-strategy {strategy}, not {self.qlora_strategy}"
                )
        if self.qlora_strategy == "variable":
            self._listed()

    def check_stacks(self, num_stacks: int) -> None:
        """Raises `ValueError` if the strategy variable lists other stacks than those of a rack of `num_stacks`."""
        if self.qlora_enabled and self.qlora_strategy == "variable" and len(self._listed()) < num_stacks:
            raise ValueError(
                f"--qlora-configs {self.qlora_configs}: lists {len(self._listed())} stacks, the rack has {num_stacks}"
            )

    def stack_adapter(self, stack_idx: int) -> AdapterShape:
        """Rank and alpha of the stack adapter of a stack, by the stack's index from 0.

        Raises:
            ValueError: the strategy variable does not list the stack.
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
        """Rank and alpha of the trunk's second adapter."""
        return AdapterShape(rank=self.progressive_qlora_rank, alpha=self.progressive_qlora_alpha)

    def adapters(self, stack_idx: int, *, in_trunk: bool) -> dict[str, AdapterShape]:
        """Name -> shape of a stack's adapters.

        Args:
            stack_idx: the order in which stacks were made, from 0.
            in_trunk: a stack was added after it.
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
                f"--qlora-configs {text}: must be stack:rank:alpha, with commas between, as 0:8:16,1:16:32"
            ) from None
        if number in shapes:
            raise ValueError(f"--qlora-configs {text}: names stack {number} twice")
        if shape.rank < 1 or not shape.alpha > 0:
            raise ValueError(
                f"--qlora-configs {text}: stack {number} has rank {shape.rank}, alpha {shape.alpha:g}; "
                "the rank must be at least 1, alpha above 0"
            )
        shapes[number] = shape
    if sorted(shapes) != list(range(len(shapes))):
        raise ValueError(
            f"--qlora-configs {text}: must name every stack from 0 on, it names {sorted(shapes)}"
        )
    return [shapes[number] for number in range(len(shapes))]
