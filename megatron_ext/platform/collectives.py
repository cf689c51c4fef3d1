"""Shares results and errors among all ranks, so that a failure on one does not leave the others in a collective."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import describe

T = TypeVar("T")


def gather(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns all results on every rank. Collective.

    Args:
        action: must not itself wait for other ranks; its result must be picklable.

    Returns:
        The results, ordered by rank.

    Raises:
        ValueError: `action` raised a `ValueError` on some rank; raised on every rank with the lowest rank's message.
        OSError: as `ValueError`.
        RuntimeError: `action` raised another exception on another rank. The failing rank raises its own exception.
    """
    result, own = None, None
    try:
        result = action()
    except Exception as error:
        own = error
    found: list[tuple[str, str, T]] = [("", "", None)] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(found, (_kind(own), "" if own is None else describe(own), result))
    for rank, (kind, message, _) in enumerate(found):
        if kind == "ValueError":
            raise ValueError(message) from own
        if kind == "OSError":
            raise OSError(message) from own
        if kind:
            raise own or RuntimeError(f"rank {rank} failed: {message}")
    return [result for _, _, result in found]


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and returns its result on every rank; raises as `gather` does. Collective."""
    return gather(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def _kind(error: Exception | None) -> str:
    if error is None:
        return ""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind.__name__
    return "other"


def print_on_first_rank(message: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)
