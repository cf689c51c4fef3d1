"""TensorBoard's event files, so written that a killed run loses little and a resumed one overwrites its own past.

Curves over steps lie in the given directory, curves over consumed samples (Megatron's `... vs samples`) in its folder
`by_samples`, which TensorBoard shows as a run of its own. They must be apart: a resumed run tells TensorBoard from
which step on the older values are void, and that holds for all curves of a folder, whatever their unit.
The charts of both folders are laid out on TensorBoard's Custom Scalars page.
"""

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.logging.chart_layout import SAMPLES_ENDING, ChartLayout
from megatron_ext.training.logging.run_charts import RUN_CHARTS

_FLUSH_SECONDS = 10
SAMPLES_FOLDER = "by_samples"
"""Folder of the curves over consumed samples."""


class TensorBoard:
    """Writes scalars and texts; one writer a run, on one rank."""

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
            directory: made if missing.
            charts: of the families' values.
            iteration: the last step that counts; later values of an earlier run in this directory become void.
            consumed_samples: the same in samples.

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
        """One value over steps; with `consumed_samples` also `{tag} vs samples`."""
        self._by_step.add_scalar(tag, value, iteration)
        self._layout.add(tag)
        self._iteration = iteration
        if consumed_samples is not None:
            self._by_samples.add_scalar(tag + SAMPLES_ENDING, value, consumed_samples)
            self._layout.add(tag + SAMPLES_ENDING)

    def text(self, tag: str, text: str, iteration: int) -> None:
        """A text in Markdown."""
        self._by_step.add_text(tag, text, iteration)

    def flush(self) -> None:
        """Brings everything to the files, the layout first where it has changed."""
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
    purge_step = last_step + 1 if last_step > 0 else None
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
