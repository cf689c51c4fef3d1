"""Declares which TensorBoard scalars share a chart, and the section, title and caption of that chart.

The training code and every model family declare charts for the tags that they write. TensorBoard's Custom Scalars page
and the report pages follow these declarations; a tag without a declaration gets a separate chart.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOSSES = "Losses"
"""Name of the first section on every page."""
OTHER_VALUES = "Other values"
"""Name of the section for tags that no chart declares."""

_LAYER = re.compile(r"(?P<name>.+)/layer_\d+(?P<split> \w+)?")
_EVALUATION = re.compile(r"(?P<name>.+?)( validation| test)?(?P<perplexity> ppl)?")


@dataclass(frozen=True, kw_only=True)
class ScalarChart:
    """Declares one chart: which scalars it shows, and its section, title and caption."""

    section: str
    """Heading of the chart's section."""

    title: str
    """Title of the chart, unique in its section."""

    tags: str
    """Regular expression that fully matches every tag in the chart."""

    shows: str = ""
    """Sentence in the caption that explains the values."""


def chart_of(tag: str, charts: Iterable[ScalarChart]) -> ScalarChart:
    """Returns the chart that shows a tag: a declared chart, or a new one if the tag is not declared.

    A new chart also shows the tags of the same value for other layers, or for training, validation and test.
    """
    declared = next((chart for chart in charts if re.fullmatch(chart.tags, tag)), None)
    if declared is not None:
        return declared
    if layer := _LAYER.fullmatch(tag):
        name, split = layer["name"], layer["split"] or ""
        return ScalarChart(
            section=OTHER_VALUES, title=f"{name}, layers{split}", tags=rf"{re.escape(name)}/layer_\d+{split}"
        )
    found = _EVALUATION.fullmatch(tag)
    assert found is not None, "every text matches"
    name, perplexity = found["name"], found["perplexity"] or ""
    return ScalarChart(
        section=OTHER_VALUES,
        title=name + perplexity,
        tags=rf"{re.escape(name)}( validation| test)?{perplexity}",
    )
