"""On gloo, one process group for every set of ranks, however many parts of megatron-core ask for one.

Every gloo group costs its process three threads, one of which wakes a hundred times a second. megatron-core asks for
some twenty groups; with few processes most of them are the same few sets of ranks, and many hold a single rank. Sharing
is safe on gloo: ranks issue the collectives of one set in the same order whichever part of the engine asks, and gloo
tells messages between two ranks apart from collectives.

With NCCL every group stays its own: there they are communicators with streams of their own, made when first used.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


class _Groups:
    """Sorted ranks -> their group, or torch's mark of a group that this rank is not in."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): world}


_groups: _Groups | None = None
"""Those of the process group that this process has joined."""


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Within it megatron-core gets one group for every set of ranks; collective, as its making of groups is.

    This replaces a function of the engine for the time of a call: it has no argument for how groups are made.
    """
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
    """Lets go of the groups, whose threads live as long as somebody has them; call where the process group ends."""
    global _groups
    _groups = None
