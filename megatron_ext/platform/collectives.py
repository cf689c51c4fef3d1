"""Shares results and errors among all ranks, so that a failure on one rank does not leave the others waiting.

Without a process group, the process counts as the only rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import describe

K = TypeVar("K")
T = TypeVar("T")

_KINDS = (ValueError, FileNotFoundError, OSError)
"""Exception types that stay the same when an error is raised again on the other ranks."""


def gather_or_raise(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns all results on every rank. Collective.

    Args:
        action: function without arguments; must not itself wait for other ranks, and its result must be picklable.

    Returns:
        The results, ordered by rank.

    Raises:
        ValueError: `action` raised a `ValueError` on a rank. Every rank raises the error of the lowest failing rank.
        OSError: likewise, if `action` raised an `OSError`; a `FileNotFoundError` keeps its type.
        RuntimeError: `action` raised any other exception on another rank. The failing rank raises its own exception.
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
    """Runs `action` on rank 0 and returns its result on every rank; raises as `gather_or_raise` does. Collective."""
    return gather_or_raise(lambda: action() if is_first_rank() else None)[0]  # type: ignore[return-value]


def on_every_rank(action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns this rank's result; raises as `gather_or_raise` does. Collective."""
    kept: list[T] = []
    gather_or_raise(lambda: kept.append(action()))
    return kept[0]


def holds_on_every_rank(condition: bool) -> bool:
    """Returns whether a condition holds on every rank. Collective."""
    # Use gloo if the run has it, because then the host does not wait for the GPU.
    device = "cpu" if "gloo" in dist.get_backend_config() else torch.cuda.current_device()
    value = torch.tensor([condition], dtype=torch.int32, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())


def merge_over_ranks(local: Mapping[K, T], group: dist.ProcessGroup | None = None) -> dict[K, T]:
    """Returns one dict with the entries of all ranks in `group` (of every rank if it is None). Collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, dict(local), group=group)
    return {key: value for part in found for key, value in part.items()}


def is_first_rank() -> bool:
    """Returns whether this is rank 0; True if there is no process group."""
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
