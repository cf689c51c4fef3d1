"""What one rank finds out, every rank must know: a failure on one must not leave the others waiting in a collective."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import describe

T = TypeVar("T")


def gather(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and gives every rank all results; collective.

    Args:
        action: must not itself wait for other ranks. Its result must be picklable.

    Returns:
        The results in the order of ranks.

    Raises:
        ValueError: a rank raised one; so does every rank, with the message of the lowest.
        OSError: likewise.
        RuntimeError: another rank raised something else (the rank itself keeps its own exception).
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
    """Runs `action` on rank 0 and gives every rank its result; raises as `gather` does. Collective."""
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
