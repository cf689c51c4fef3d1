"""Describes the per-layer embedding of a Gemma 4 or 3n model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """The per-layer embedding of a Gemma model."""

    preset: Literal["gemma4", "gemma3n"]
    """Value of --per-layer-preset."""

    width: int
    """p, the per-layer hidden size."""

    rows: int | None = None
    """Number of rows of a table; None if it is the vocabulary size, as in every Gemma 4."""
