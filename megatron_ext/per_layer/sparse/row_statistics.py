"""Counts the rows that steps look up, and the bytes of these rows' gradients; logged with --log-per-layer-stats.

    per-layer/rows-touched             rows that the step looks up, on all data-parallel ranks together
    per-layer/rows-ever-touched-share  share of a table's rows that a step has looked up since the run began or resumed
    per-layer/row-gradients-mib        MiB of the rows' gradients in one copy of the model

All layers look up the same ids, so there is one value for all layers.
"""

import torch


class RowStatistics:
    """Counts the looked-up rows of tables with Vp rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        """Args:
        rows: Vp.
        device: the device of the ids.
        """
        self._ever = torch.zeros(rows, dtype=torch.bool, device=device)
        self._of_step = 0

    def add(self, ids: torch.Tensor) -> None:
        """Counts the distinct rows of a step, [n]."""
        self._of_step = ids.numel()
        self._ever.index_fill_(0, ids, True)

    def values(self, width: int) -> dict[str, float]:
        """Returns the values by TensorBoard tag; waits for the device.

        Args:
            width: columns of a row, in all layers of the model together.
        """
        return {
            "per-layer/rows-touched": float(self._of_step),
            "per-layer/rows-ever-touched-share": float(self._ever.double().mean()),
            "per-layer/row-gradients-mib": 4 * self._of_step * width / 2**20,
        }
