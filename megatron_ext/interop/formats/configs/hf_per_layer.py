"""Describes the per-layer embedding of a Gemma 4 or 3n."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """The per-layer embedding of a Gemma."""

    preset: Literal["gemma4", "gemma3n"]
    """Value of --per-layer-preset."""

    width: int
    """p, the per-layer hidden size."""

    rows: int | None = None
    """Number of rows of a table; None for the vocabulary size, as always in Gemma 4."""
