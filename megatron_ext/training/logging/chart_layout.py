"""The layout of TensorBoard's Custom Scalars page: a chart for every group of tags that a run has written so far.

The layout is stored as an event in the run's TensorBoard files. TensorBoard uses the last layout that it finds, so the
layout is written again whenever a new tag adds a chart, and a resumed run starts from the layouts in its files.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata

from megatron_ext.reports.events import EVENT_FILES
from megatron_ext.reports.scalar_charts import OTHER_VALUES, ScalarChart, chart_of
from megatron_ext.training.logging.run_charts import COUNTS

OVER_SAMPLES = "Over consumed samples"
"""Section of the curves whose x axis is the number of samples instead of steps."""
SAMPLES_ENDING = " vs samples"
"""Ending of the tags of curves over consumed samples."""

_LAST = (OTHER_VALUES, COUNTS, OVER_SAMPLES)
_CLOSED = (COUNTS, OVER_SAMPLES)
_Entry = tuple[str, str, str]
"""Section of the page, title, and regular expression for the tags of a chart."""


class ChartLayout:
    """Collects a run's tags and lays out their charts."""

    def __init__(self, charts: Sequence[ScalarChart], folder: Path) -> None:
        """Starts with the charts in the event files of `folder`, which an earlier run may have written.

        Args:
            charts: all charts that the training system and the run's model families declare, in the order of the page.
            folder: directory of the run's event files; may be missing.
        """
        self._charts = charts
        declared = [*map(_entry, charts), *(_entry(chart, over_samples=True) for chart in charts)]
        self._rank = {entry: rank for rank, entry in enumerate(declared)}
        earlier = _earlier_entries(folder)
        # An earlier chart whose declaration has changed is dropped, because its tags would otherwise appear in two
        # charts.
        self._entries = {entry for entry in earlier if entry in self._rank or entry[0] == OTHER_VALUES}
        self._tags = set[str]()
        self._is_written = False

    def add(self, tag: str) -> None:
        """Adds the chart of a tag that the run writes, if the layout does not contain it yet."""
        if tag in self._tags:
            return
        self._tags.add(tag)
        over_samples = tag.endswith(SAMPLES_ENDING)
        entry = _entry(chart_of(tag.removesuffix(SAMPLES_ENDING), self._charts), over_samples=over_samples)
        if entry not in self._entries:
            self._entries.add(entry)
            self._is_written = False

    def summary(self) -> Summary | None:
        """Returns the layout as a TensorBoard summary to write, or None if it has not changed."""
        if self._is_written or not self._entries:
            return None
        self._is_written = True
        content = TensorProto(
            dtype="DT_STRING",
            string_val=[self._layout().SerializeToString()],
            tensor_shape=TensorShapeProto(),
        )
        value = Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=content, metadata=create_summary_metadata())
        return Summary(value=[value])

    def _layout(self) -> Layout:
        undeclared = len(self._rank)
        entries = sorted(self._entries, key=lambda entry: (self._rank.get(entry, undeclared), entry))
        charts: dict[str, list[Chart]] = {}
        for section, title, pattern in entries:
            chart = Chart(title=title, multiline=MultilineChartContent(tag=[pattern]))
            charts.setdefault(section, []).append(chart)
        sections = sorted(charts, key=lambda section: _LAST.index(section) + 1 if section in _LAST else 0)
        return Layout(
            category=[
                Category(title=section, chart=charts[section], closed=section in _CLOSED)
                for section in sections
            ]
        )


def _entry(chart: ScalarChart, *, over_samples: bool = False) -> _Entry:
    # TensorBoard matches the expression only at the beginning of a tag, so the expression must also describe the
    # tag's end.
    if over_samples:
        return OVER_SAMPLES, chart.title, f"(?:{chart.tags}){SAMPLES_ENDING}$"
    return chart.section, chart.title, f"(?:{chart.tags})$"


def _earlier_entries(folder: Path) -> set[_Entry]:
    """Returns the charts of every chart layout that earlier runs wrote to the event files in a directory."""
    marker = CONFIG_SUMMARY_TAG.encode()
    found = set[_Entry]()
    for file in folder.glob(f"{EVENT_FILES}*"):
        for record in _records(file):
            if marker in record:
                found |= _entries_in(record)
    return found


def _entries_in(record: bytes) -> set[_Entry]:
    return {
        (category.title, chart.title, pattern)
        for value in Event.FromString(record).summary.value
        if value.tag == CONFIG_SUMMARY_TAG
        for category in Layout.FromString(value.tensor.string_val[0]).category
        for chart in category.chart
        for pattern in chart.multiline.tag
    }


def _records(file: Path) -> Iterator[bytes]:
    """Yields the records of an event file.

    A record is stored as its length (8 bytes), the length's checksum (4), its content, the content's checksum (4).
    """
    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            record = stream.read(length + 4)
            if len(record) < length + 4:
                return  # the incomplete last record of a killed run
            yield record[:length]
