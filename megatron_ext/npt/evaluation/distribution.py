"""Describes a set of numbers: count, mean, deviation, extremes, percentiles, histogram."""

from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 50


def distribution(values: npt.NDArray[Any], *, histogram: bool = False) -> dict[str, Any]:
    """Returns the number of values; and mean, deviation, extremes, percentiles and histogram of the finite values."""
    values = values.astype(np.float64)
    good = values[np.isfinite(values)]
    found: dict[str, Any] = {"count": len(values), "not_finite": len(values) - len(good)}
    if not len(good):
        return found | dict.fromkeys(("mean", "std", "min", "max", "percentiles"), None)
    marks = np.percentile(good, PERCENTILES)
    found |= {
        "mean": float(good.mean()),
        "std": float(good.std()),
        "min": float(good.min()),
        "max": float(good.max()),
        "percentiles": {f"p{p}": float(mark) for p, mark in zip(PERCENTILES, marks, strict=True)},
    }
    if histogram:
        counts, edges = np.histogram(good, bins=_BINS)
        found["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return found
