"""Writes TensorBoard's event files; a resumed run replaces values that were written after its checkpoint.

Curves over steps are in the given directory; curves over consumed samples (Megatron's `... vs samples`) are in its
subdirectory `by_samples`, which TensorBoard shows as a separate run. The two kinds cannot share a directory: a resumed
run gives TensorBoard a step, which applies to every curve in a directory, and earlier values for this and later steps
become invalid. TensorBoard's Custom Scalars page shows charts of both kinds.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_ext.reports.events import EVENT_FILES
from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.logging.chart_layout import SAMPLES_ENDING, ChartLayout
from megatron_ext.training.logging.run_charts import RUN_CHARTS

_FLUSH_SECONDS = 10  # if the run is killed, at most the curves of the last 10 seconds are lost
SAMPLES_FOLDER = "by_samples"
"""Subdirectory of the curves over consumed samples."""


class TensorBoard:
    """Writes scalars and texts; a run has one writer, on rank 0."""

    def __init__(
        self,
        directory: str,
        *,
        charts: Sequence[ScalarChart] = (),
        iteration: int = 0,
        consumed_samples: int = 0,
    ) -> None:
        """Opens the event files.

        Args:
            directory: the directory of the event files; created if it is missing.
            charts: the model families' charts.
            iteration: the step from which the run continues; values that the files already contain for later steps
                become invalid.
            consumed_samples: number of samples consumed up to that step.

        Raises:
            ValueError: the directory cannot be written.
        """
        self._layout = ChartLayout((*RUN_CHARTS, *charts), Path(directory))
        self._iteration = iteration
        try:
            self._by_step = _writer(Path(directory), iteration)
            self._by_samples = _writer(Path(directory, SAMPLES_FOLDER), consumed_samples)
        except OSError as error:
            raise ValueError(f"--tensorboard-dir {directory}: {error.strerror}") from None

    def scalar(self, tag: str, value: float, iteration: int, consumed_samples: int | None = None) -> None:
        """Writes one value of the curve over steps and, if `consumed_samples` is given, of `{tag} vs samples`."""
        self._by_step.add_scalar(tag, value, iteration)
        self._layout.add(tag)
        self._iteration = iteration
        if consumed_samples is not None:
            self._by_samples.add_scalar(tag + SAMPLES_ENDING, value, consumed_samples)
            self._layout.add(tag + SAMPLES_ENDING)

    def text(self, tag: str, text: str, iteration: int) -> None:
        """Writes a Markdown text."""
        self._by_step.add_text(tag, text, iteration)

    def flush(self) -> None:
        """Writes buffered values to the files, preceded by the layout of the charts if it has changed."""
        layout = self._layout.summary()
        if layout is not None:
            self._by_step._get_file_writer().add_summary(layout, self._iteration)
        self._by_step.flush()
        self._by_samples.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._by_step.close()
        self._by_samples.close()


def _writer(folder: Path, last_step: int) -> SummaryWriter:
    folder.mkdir(parents=True, exist_ok=True)
    if last_step > 0:
        _wait_for_a_later_name(folder)
    purge_step = last_step + 1 if last_step > 0 else None
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)


def _wait_for_a_later_name(folder: Path) -> None:
    """Waits until the next second if a file in the folder was created in the current one.

    TensorBoard reads a folder's files in the order of their names. A name contains the second of creation and ends
    with a number without leading zeros. Of two files created in the same second, the later one may therefore be read
    first; its purge step would then have no effect.
    """
    now = time.time()
    if any(folder.glob(f"{EVENT_FILES}{int(now):010d}.*")):
        time.sleep(int(now) + 1 - now)
