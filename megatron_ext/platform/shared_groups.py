"""Makes megatron-core share one process group per set of ranks.

megatron-core creates groups of about twenty kinds, many of which consist of the same ranks: groups of experts, and
groups for context parallelism even if the run has none. All processes take part in creating each of them, and a gloo
group costs each of its ranks three threads, one of which wakes a hundred times per second. Sharing is safe: all ranks
issue the collectives of a set of ranks in the same order, and point-to-point messages are separate.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


class _Groups:
    """Maps a sorted tuple of ranks to their group, or to torch's `NON_GROUP_MEMBER` if this rank is not in it."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): world}


_groups: _Groups | None = None
"""Groups created since this process joined its current default process group."""


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Inside this context, megatron-core gets the same group whenever it asks for the same ranks. Collective."""
    # mcore has no argument for the creation of groups, so its function is replaced inside the block.
    global _groups
    if _groups is None or _groups.world is not dist.group.WORLD:
        _groups = _Groups(dist.group.WORLD)
    made, make = _groups.made, parallel_state.create_group

    def create_group(
        ranks: list[int], timeout: timedelta | None = None, backend: str | None = None, **_: Any
    ) -> Any:
        if backend is not None:
            # An additional gloo group is not shared; mcore destroys it together with its parallel state.
            return make(ranks, timeout=timeout, backend=backend)
        key = tuple(sorted(ranks))
        if key not in made:
            made[key] = make(ranks, timeout=timeout, group_desc=f"ranks {', '.join(map(str, key))}")
        return made[key]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = make


def forget() -> None:
    """Drops all shared groups, so that their threads end; call this when the default process group is destroyed."""
    global _groups
    _groups = None
