"""Charts hold the numbers and labels given, whatever the numbers are, and depend on nothing else."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np

from megatron_ext.reports import charts
from megatron_ext.reports.charts import (
    bar_chart,
    curves_chart,
    histogram_chart,
    metric_heat_map,
    step_heat_map,
)


def _texts(svg: str) -> list[str]:
    """The chart's labels; parsing proves that it is well-formed."""
    return [text.text or "" for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_metric_heat_map_shows_every_number_in_its_place() -> None:
    svg = metric_heat_map(["3", "7"], ["mse", "cosine"], [[0.125, 2.0], [None, 1e-9]])
    texts = _texts(svg)
    assert [text for text in texts if text in ("0.125", "2", "-", "1e-09")] == ["0.125", "2", "-", "1e-09"]
    assert {"3", "7", "mse", "cosine", "layer"} <= set(texts)


def test_labels_are_escaped_and_are_no_formulas() -> None:
    name = "<b>$\\alpha$ & co"
    svg = bar_chart({name: 1.0, "other": math.inf}, y_label="y")
    assert name in _texts(svg)
    assert "<b>" not in svg


def test_logarithmic_scales_are_written_as_numbers() -> None:
    curve = ([1, 2, 3], [0.01, 1.0, 100.0])
    for svg in (curves_chart({"a": curve}, y_label="y"), step_heat_map({0: curve}, title="x")):
        assert {"1", "100"} <= set(_texts(svg))
        assert "$" not in svg


def test_the_same_numbers_give_the_same_text() -> None:
    svg = [curves_chart({"a": ([1, 2], [1.0, 2.0])}, y_label="y", bands=[("s", 1, 2)]) for _ in range(2)]
    assert svg[0] == svg[1]
    assert not re.search(r"\d{4}-\d\d-\d\d", svg[0])


def test_numbers_that_are_not_finite_do_not_break_a_chart() -> None:
    curve = ([1, 2, 3], [math.nan, math.inf, 1.0])
    for svg in (
        curves_chart({"a": curve}, y_label="y"),
        curves_chart({"a": ([1], [math.nan])}, y_label="y"),
        step_heat_map({0: curve, 1: ([1], [math.nan])}, title="x"),
        step_heat_map({0: ([5], [math.nan])}, title="x"),
        histogram_chart([0, 1], [3], x_label="x", marks=[("mean", 0.5)]),
        metric_heat_map(["0"], ["a"], [[math.nan]]),
    ):
        assert _texts(svg)


def test_steps_that_are_many_are_averaged_and_few_stay_apart() -> None:
    few, first, last = charts._binned({4: ([10, 20, 30], [1.0, 2.0, 3.0]), 5: ([20], [7.0])})
    assert (first, last) == (10, 30)
    np.testing.assert_array_equal(few, [[1, 2, 3], [np.nan, 7, np.nan]])
    steps = list(range(1, 3001))
    many, _, _ = charts._binned({0: (steps, [float(step) for step in steps])})
    assert many.shape == (1, 300)
    assert np.all(np.diff(many[0]) > 0)
    assert abs(many[0].mean() - 1500) < 10


def test_a_heat_maps_title_lies_above_it_where_no_edge_cuts_it_off() -> None:
    title = "a title that is longer than two rows are high"
    (found,) = [
        text
        for text in ET.fromstring(step_heat_map({0: ([1], [1.0]), 1: ([1], [2.0])}, title=title)).iter()
        if text.text == title
    ]
    assert "rotate(-90" not in found.attrib["transform"]


def test_a_heat_map_of_many_layers_is_not_higher_than_a_page_and_labels_some_of_them() -> None:
    svg = step_heat_map({layer: ([1, 2], [1.0, layer]) for layer in range(96)}, title="x")
    height = float(ET.fromstring(svg).attrib["height"].removesuffix("pt"))
    assert height < 72 * 6.5
    assert {"0", "4", "92"} <= set(_texts(svg)) and "93" not in _texts(svg)


def test_a_stage_in_which_a_value_was_not_measured_is_not_named_beside_its_heat_map() -> None:
    bands = [("early", 1.0, 2.0), ("late", 3.0, 9.0), ("after", 10.0, 20.0)]
    texts = _texts(step_heat_map({0: ([3, 4, 5], [1.0, 2.0, 3.0])}, title="x", bands=bands))
    assert "late" in texts
    assert not {"early", "after"} & set(texts)
