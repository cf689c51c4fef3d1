"""Draws the charts of one training run: related losses in one chart, other tags one each, layers as heat maps."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.reports.charts import curves_chart, step_heat_map
from megatron_ext.reports.events import Curve, layer_groups, plain_curves, stages


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart with its name and caption."""

    name: str
    """The tag, or the common name of several tags."""

    caption: str
    """Text below the chart."""

    svg: str
    """The chart as SVG text."""


def training_charts(
    curves: dict[str, Curve], wanted: Callable[[str], bool] = lambda tag: True
) -> list[Chart]:
    """Draws all wanted tags: losses first, then perplexities, other curves, and heat maps of layers.

    Args:
        curves: TensorBoard tag -> steps and values.
        wanted: returns True for a tag to draw. The stages of a curriculum are shaded in any case.
    """
    bands = [(name, float(first), float(last)) for name, first, last in stages(curves)]
    chosen = {tag: curve for tag, curve in curves.items() if wanted(tag)}
    plain = {tag: curve for tag, curve in plain_curves(chosen).items() if curve[0]}
    charts = []
    for kind, of_kind in _by_kind(plain).items():
        title = kind if len(of_kind) > 1 else next(iter(of_kind))
        svg = curves_chart(of_kind, y_label=kind, bands=bands)
        charts.append(Chart(name=title, caption=", ".join(of_kind), svg=svg))
    for name, layers in layer_groups(chosen).items():
        svg = step_heat_map(layers, label=name, bands=bands)
        charts.append(Chart(name=f"{name}/layers", caption=f"{name} of every layer over the steps.", svg=svg))
    return charts


def _by_kind(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Groups tags that share a chart: a tag and its variants, such as `lm loss` and `lm loss validation`."""
    kinds: dict[str, dict[str, Curve]] = {}
    for tag, curve in sorted(curves.items(), key=lambda item: (_rank(item[0]), item[0])):
        ends = " ppl" if tag.endswith(" ppl") else ""
        stem = next((known for known in kinds if tag.startswith(f"{known} ") and not ends), tag)
        kind = "perplexity" if ends else stem
        kinds.setdefault(kind, {})[tag] = curve
    return kinds


def _rank(tag: str) -> int:
    """Sort key: losses first, then perplexities, then the rest."""
    return (
        0 if "loss" in tag and not tag.endswith(" ppl") else 1 if "ppl" in tag or "perplexity" in tag else 2
    )
