"""Draws the charts of one training run: losses first, then heat maps of layers, then all other curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.reports.charts import Band, curves_chart, step_heat_map
from megatron_ext.reports.events import STAGE_TAG, Curve, layer_groups, plain_curves, stages
from megatron_ext.reports.scalar_charts import LOSSES, ScalarChart, chart_of


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart with its name and caption."""

    section: str
    """Heading of the chart's section."""

    name: str
    """Title of the chart; no other chart of the run has the same title."""

    caption: str
    """Text below the chart: what it shows, and the TensorBoard tags of its values."""

    svg: str
    """The chart as SVG text."""

    is_heat_map: bool
    """Whether the chart is a heat map (layer x step) instead of curves."""


def training_charts(
    curves: dict[str, Curve],
    declared: Sequence[ScalarChart] = (),
    wanted: Callable[[str], bool] = lambda tag: True,
) -> list[Chart]:
    """Draws charts of all wanted tags, sorted by section; shades the curriculum stages of a run that has several.

    Args:
        curves: steps and values of each TensorBoard tag.
        declared: charts of known tags; a tag that belongs to none of them gets a separate chart.
        wanted: returns whether a tag is to be drawn.
    """
    bands = [(name, float(first), float(last)) for name, first, last in stages(curves)]
    if len(bands) == 1:
        bands = []  # one name over the whole chart would be useless
    constant = constant_values(curves, wanted)
    groups: dict[ScalarChart, dict[str, Curve]] = {}
    # Short tags come first, so that a training loss precedes the same loss in validation.
    for tag, curve in sorted(curves.items(), key=lambda item: (len(item[0]), item[0])):
        if wanted(tag) and tag != STAGE_TAG and curve[0] and tag not in constant:
            groups.setdefault(chart_of(tag, declared), {})[tag] = curve
    place = {chart: number for number, chart in enumerate(declared)}
    ordered = sorted(groups, key=lambda chart: place.get(chart, len(place)))
    return _in_sections([drawn for chart in ordered for drawn in _draw(chart, groups[chart], bands)])


def constant_values(
    curves: dict[str, Curve], wanted: Callable[[str], bool] = lambda tag: True
) -> dict[str, float]:
    """Returns the wanted tags that have the same value at every step, with this value; `training_charts` omits them.

    Tags with a single step are not included, nor are values of layers, because their heat map shows all layers
    together.
    """
    return {
        tag: values[0]
        for tag, (_, values) in sorted(plain_curves(curves).items())
        if wanted(tag) and len(values) > 1 and len(set(values)) == 1
    }


def _draw(chart: ScalarChart, curves: dict[str, Curve], bands: Sequence[Band]) -> list[Chart]:
    """Draws a heat map for each `name` of tags `name/layer_N`, and a single chart with a line for each other tag."""
    drawn = []
    for name, layers in layer_groups(curves).items():
        svg = step_heat_map(layers, title=chart.title, bands=bands)
        caption = _caption(chart, f"One row per layer. Tag: {name}/layer_N.")
        drawn.append(
            Chart(section=chart.section, name=chart.title, caption=caption, svg=svg, is_heat_map=True)
        )
    if plain := plain_curves(curves):
        name = f"{chart.title}, mean" if drawn else chart.title
        svg = curves_chart(plain, y_label=name, bands=bands)
        caption = _caption(chart, f"{'Tags' if len(plain) > 1 else 'Tag'}: {', '.join(plain)}.")
        drawn.append(Chart(section=chart.section, name=name, caption=caption, svg=svg, is_heat_map=False))
    return drawn


def _caption(chart: ScalarChart, tags: str) -> str:
    return f"{chart.shows or chart.title + '.'} {tags}"


def _in_sections(charts: list[Chart]) -> list[Chart]:
    """Sorts charts by section: losses, then sections with heat maps, then the others."""
    with_heat_maps = {chart.section for chart in charts if chart.is_heat_map}
    sections = list(dict.fromkeys(chart.section for chart in charts))
    ordered = sorted(sections, key=lambda section: (section != LOSSES, section not in with_heat_maps))
    return sorted(charts, key=lambda chart: ordered.index(chart.section))
