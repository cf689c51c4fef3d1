"""Which scalars share a chart, in which section, and what the chart shows.

The training system and every family declare the charts of the tags that they write. TensorBoard's Custom Scalars page
and our own pages are laid out by these declarations; a tag that nobody has declared gets a chart of its own.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOSSES = "Losses"
"""The first section of every page."""
OTHER_VALUES = "Other values"
"""Section of the tags that nobody has declared."""

_LAYER = re.compile(r"(?P<name>.+)/layer_\d+(?P<split> \w+)?")
_EVALUATION = re.compile(r"(?P<name>.+?)( validation| test)?(?P<perplexity> ppl)?")


@dataclass(frozen=True, kw_only=True)
class ScalarChart:
    """The scalars of one chart."""

    section: str
    """Heading under which the chart stands."""

    title: str
    """Title of the chart, unique in its section."""

    tags: str
    """Regular expression that matches the whole of every tag in the chart."""

    shows: str = ""
    """What the values are: one sentence for the caption."""


def chart_of(tag: str, charts: Iterable[ScalarChart]) -> ScalarChart:
    """The declared chart that a tag belongs to; else a new one, shared with the tag's other layers and splits."""
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
