"""Declares which scalars share a chart, and the section, title and caption of the chart.

The training system and every family declare charts for the tags that they write. TensorBoard's Custom Scalars page and
our own pages follow these declarations; an undeclared tag gets its own chart.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOSSES = "Losses"
"""The first section of every page."""
OTHER_VALUES = "Other values"
"""Section of undeclared tags."""

_LAYER = re.compile(r"(?P<name>.+)/layer_\d+(?P<split> \w+)?")
_EVALUATION = re.compile(r"(?P<name>.+?)( validation| test)?(?P<perplexity> ppl)?")


@dataclass(frozen=True, kw_only=True)
class ScalarChart:
    """The scalars of one chart."""

    section: str
    """Heading of the chart's section."""

    title: str
    """Title of the chart, unique in its section."""

    tags: str
    """Regular expression that fully matches every tag in the chart."""

    shows: str = ""
    """Sentence for the caption that explains the values."""


def chart_of(tag: str, charts: Iterable[ScalarChart]) -> ScalarChart:
    """Returns the declared chart of a tag, or a new chart for the tag with its other layers and splits."""
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
