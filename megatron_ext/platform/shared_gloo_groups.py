"""Makes megatron-core share one gloo process group per set of ranks.

megatron-core creates about twenty groups, and every gloo group costs each process three threads, one of which wakes a
hundred times per second. With few processes, most groups consist of the same ranks. Sharing them is safe with gloo: all
ranks issue the collectives of a set of ranks in the same order, and gloo keeps point-to-point messages separate.

NCCL groups are not shared: each is a communicator with its own stream, created at its first use.
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
    # mcore has no argument for how groups are created, so its function is replaced inside the block.
    global _groups
    if _groups is None or _groups.world is not dist.group.WORLD:
        _groups = _Groups(dist.group.WORLD)
    made, make = _groups.made, parallel_state.create_group

    def create_group(ranks: list[int], timeout: timedelta | None = None, **_: Any) -> Any:
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
