"""The layout grows with the tags that are written, and a resumed run keeps the charts of the one before."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.logging.tensorboard_writer import TensorBoard

CHARTS = [ScalarChart(section="Layers", title="Size", tags=r"size/layer_\d+")]


def _layouts(folder: Path) -> list[dict[str, list[str]]]:
    """Section -> titles of every layout in the files that is not void."""
    events = EventAccumulator(str(folder)).Reload()
    layouts = [
        Layout.FromString(event.tensor_proto.string_val[0]) for event in events.Tensors(CONFIG_SUMMARY_TAG)
    ]
    return [
        {section.title: [chart.title for chart in section.chart] for section in layout.category}
        for layout in layouts
    ]


def _write(folder: Path, tags: list[str], *, steps: range, resumed_at: int = 0) -> None:
    tensorboard = TensorBoard(str(folder), charts=CHARTS, iteration=resumed_at)
    for step in steps:
        for tag in tags:
            tensorboard.scalar(tag, 1.0, step)
        tensorboard.flush()
    tensorboard.close()


def test_a_statistic_of_96_layers_is_one_chart_and_is_laid_out_once(tmp_path: Path) -> None:
    _write(tmp_path, ["lm loss", *(f"size/layer_{layer:02d}" for layer in range(96))], steps=range(1, 4))
    assert _layouts(tmp_path) == [{"Losses": ["Cross-entropy"], "Layers": ["Size"]}]


def test_a_tag_that_nobody_has_declared_has_a_chart_with_its_other_layers_and_splits(tmp_path: Path) -> None:
    tags = [
        "new (loss",
        "new (loss validation",
        "new (loss validation ppl",
        "other/layer_3",
        "other/layer_11",
    ]
    _write(tmp_path, tags, steps=range(1, 2))
    assert _layouts(tmp_path) == [{"Other values": ["new (loss", "new (loss ppl", "other, layers"]}]


@pytest.mark.parametrize("resumed_at", [1, 4])
def test_a_resumed_run_keeps_the_charts_of_values_that_it_has_not_measured_yet(
    tmp_path: Path, resumed_at: int
) -> None:
    _write(tmp_path, ["lm loss", "size/layer_0", "mine"], steps=range(1, 6))
    _write(tmp_path, ["lm loss"], steps=range(resumed_at + 1, resumed_at + 2), resumed_at=resumed_at)
    assert _layouts(tmp_path)[-1] == {
        "Losses": ["Cross-entropy"],
        "Layers": ["Size"],
        "Other values": ["mine"],
    }


def test_an_event_file_that_a_kill_has_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    _write(tmp_path, ["size/layer_0"], steps=range(1, 3))
    (file,) = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-7])
    _write(tmp_path, ["lm loss"], steps=range(3, 4), resumed_at=2)
    assert _layouts(tmp_path)[-1] == {"Losses": ["Cross-entropy"], "Layers": ["Size"]}
