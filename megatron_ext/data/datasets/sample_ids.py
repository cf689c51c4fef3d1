"""What names a sequence: a digest of its content.

The same tokens have the same id in every epoch, order, restart and cut, and other data have other ids; no number has to
be carried through samplers and loaders for it.
"""

import hashlib
from collections.abc import Iterable

import torch

Id = bytes
"""16 bytes."""


def sample_ids(rows: torch.Tensor) -> list[Id]:
    """An id for each row of `rows` [b, ...]."""
    return [digest([row]) for row in rows]


def digest(parts: Iterable[bytes | torch.Tensor], size: int = 16) -> bytes:
    """A digest of tensors (their type, shape and bytes) and bytes, in this order.

    Args:
        parts: what to digest; tensors of any type, on any device.
        size: bytes of the digest.
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
