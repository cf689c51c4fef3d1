"""What one rank finds out, every rank must know: a failure on one must not leave the others waiting in a collective.

Without a process group there is one rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import describe

K = TypeVar("K")
T = TypeVar("T")

_KINDS = (ValueError, FileNotFoundError, OSError)
"""Errors of these kinds keep their kind on the other ranks."""


def gather_or_raise(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and gives every rank all results; collective.

    Args:
        action: must not itself wait for other ranks. Its result must be picklable.

    Returns:
        The results in the order of ranks.

    Raises:
        ValueError: a rank raised one; so does every rank, with the message of the lowest.
        OSError: likewise, and so is `FileNotFoundError`.
        RuntimeError: another rank raised something else (the rank itself keeps its own exception).
    """
    if not dist.is_initialized():
        return [action()]
    result, own = None, None
    try:
        result = action()
    except Exception as error:
        own = error
    found: list[tuple[str, str, T]] = [("", "", None)] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(found, (_kind(own), "" if own is None else describe(own), result))
    for rank, (kind, message, _) in enumerate(found):
        for known in _KINDS:
            if kind == known.__name__:
                raise known(message) from own
        if kind:
            raise own or RuntimeError(f"rank {rank} failed: {message}")
    return [result for _, _, result in found]


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives every rank its result; raises as `gather_or_raise` does. Collective."""
    return gather_or_raise(lambda: action() if is_first_rank() else None)[0]  # type: ignore[return-value]


def on_every_rank(action: Callable[[], T]) -> T:
    """Runs `action` on every rank, which keeps its own result; raises as `gather_or_raise` does. Collective."""
    kept: list[T] = []
    gather_or_raise(lambda: kept.append(action()))
    return kept[0]


def merge_over_ranks(local: Mapping[K, T], group: dist.ProcessGroup | None = None) -> dict[K, T]:
    """The entries of all ranks of a group (of all ranks without one), on each of them; collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, dict(local), group=group)
    return {key: value for part in found for key, value in part.items()}


def is_first_rank() -> bool:
    """True on rank 0, and where there is no process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _kind(error: Exception | None) -> str:
    if error is None:
        return ""
    for kind in _KINDS:
        if isinstance(error, kind):
            return kind.__name__
    return "other"


def print_on_first_rank(message: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)
