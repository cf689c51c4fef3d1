"""Identifies a sample by a digest of its content.

The same tokens have the same id in every epoch, order, restart and parallel layout, and different tokens have different
ids, so samplers and loaders need not pass sample numbers on.
"""

import hashlib
from collections.abc import Iterable

import torch

Id = bytes
"""Id of a sample: a digest of 16 bytes."""


def sample_ids(rows: torch.Tensor) -> list[Id]:
    """Returns an id for each row of `rows` [b, ...]."""
    return [digest([row]) for row in rows]


def digest(parts: Iterable[bytes | torch.Tensor], size: int = 16) -> bytes:
    """Returns one digest of all given tensors (their type, shape and content) and byte strings, in order.

    Args:
        parts: tensors (of any type, on any device) and byte strings.
        size: length of the digest in bytes.
    """
    hasher = hashlib.blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, torch.Tensor):
            content = part.detach().cpu().contiguous()
            hasher.update(f"{content.dtype}{tuple(content.shape)}".encode())
            hasher.update(content.flatten().view(torch.uint8).numpy().data)
        else:
            hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()
