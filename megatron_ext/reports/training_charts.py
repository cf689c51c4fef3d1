"""The charts of one training run, from its curves: losses together, every other tag by itself, heat maps of layers."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.reports.charts import curves_chart, step_heat_map
from megatron_ext.reports.events import Curve, layer_groups, plain_curves, stages


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture."""

    name: str
    """The tag, or what the tags together are."""

    caption: str
    """What is seen."""

    svg: str
    """The picture."""


def training_charts(
    curves: dict[str, Curve], wanted: Callable[[str], bool] = lambda tag: True
) -> list[Chart]:
    """Charts of all wanted tags: first the losses and perplexities, then other curves, then heat maps.

    Args:
        curves: by tag.
        wanted: tells whether a tag is drawn; the curriculum's stages are always shaded.
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
    """Curves that share a chart: a tag with what other tags tell of it (`lm loss`, `lm loss validation`)."""
    kinds: dict[str, dict[str, Curve]] = {}
    for tag, curve in sorted(curves.items(), key=lambda item: (_rank(item[0]), item[0])):
        ends = " ppl" if tag.endswith(" ppl") else ""
        stem = next((known for known in kinds if tag.startswith(f"{known} ") and not ends), tag)
        kind = "perplexity" if ends else stem
        kinds.setdefault(kind, {})[tag] = curve
    return kinds


def _rank(tag: str) -> int:
    """Losses first, then perplexities, then the rest."""
    return (
        0 if "loss" in tag and not tag.endswith(" ppl") else 1 if "ppl" in tag or "perplexity" in tag else 2
    )
