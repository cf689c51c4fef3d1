#!/usr/bin/env python3
"""Draws the losses of a training run and one per-layer statistic from TensorBoard files. Requires matplotlib.

An NPT run gets two pictures of losses: its cross-entropy, and the loss that it minimizes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_ext.config.command_line.field_checks import flag
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.reports.charts import require_matplotlib
from megatron_ext.reports.events import Curve, read_curves

MINIMIZED = ("npt loss", "fidelity_loss")
"""Tags of the loss that an NPT run minimizes, and of its part that compares the outputs with the base model's."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Flags for the run to draw and the picture to write."""

    tensorboard_dir: Annotated[str, flag(aliases=("--logdir",))]
    """TensorBoard directory of the run."""

    output: str
    """Picture file to write; its suffix chooses the format (png, svg, pdf)."""

    evaluation: str | None = None
    """JSON file written by tools/evaluate.py, to draw its held-out loss and unigram baseline too."""

    statistic: str = "per-layer/update-ratio"
    """TensorBoard tag of the per-layer statistic to draw, without /layer_NN; not drawn if the run does not have it."""


def main() -> None:
    """Draws the picture and prints its path."""
    config: PlotConfig = parse(
        PlotConfig,
        prog="tools/plot_training.py",
        description=str(__doc__),
        example="python tools/plot_training.py --tensorboard-dir runs/quickstart/tensorboard "
        "--evaluation runs/quickstart/evaluation.json --output docs/images/quickstart.png",
    )
    curves = read_curves(config.tensorboard_dir)
    if MINIMIZED[0] not in curves and "lm loss" not in curves:
        raise ValueError(
            f"--tensorboard-dir {config.tensorboard_dir}: the TensorBoard files do not contain the tag 'lm loss' "
            f"or '{MINIMIZED[0]}'"
        )
    draw(config, curves)
    print(config.output)


def draw(config: PlotConfig, curves: dict[str, Curve]) -> None:
    """Writes the picture.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require_matplotlib("tools/plot_training.py")
    from matplotlib.figure import Figure

    layers = sorted(tag for tag in curves if re.fullmatch(re.escape(config.statistic) + r"/layer_\d+", tag))
    minimized = {tag: curves[tag] for tag in MINIMIZED if tag in curves}
    has_cross_entropy = any(tag in curves for tag in ("lm loss", "lm loss validation"))
    count = has_cross_entropy + bool(minimized) + bool(layers)
    figure = Figure(figsize=(1 + 4.5 * count, 3.4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    if has_cross_entropy:
        _draw_losses(panels[0], config, curves)
    if minimized:
        _draw_minimized(panels[int(has_cross_entropy)], minimized)
    for number, tag in enumerate(layers):
        shade = 0.75 * (1 - number / len(layers))
        name = tag.rpartition("_")[2]
        panels[-1].plot(*curves[tag], ".-", color=(shade, shade, shade), label=f"layer {name}")
    if layers:
        panels[-1].set(xlabel="step", ylabel=config.statistic)
        panels[-1].legend(fontsize=8)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=110)


def _draw_losses(axes: Any, config: PlotConfig, curves: dict[str, Curve]) -> None:
    if "lm loss" in curves:
        axes.plot(*curves["lm loss"], color="tab:blue", linewidth=1, label="training")
    if "lm loss validation" in curves:
        axes.plot(*curves["lm loss validation"], "o-", color="tab:orange", markersize=4, label="validation")
    if config.evaluation is not None:
        found = next(iter(json.loads(Path(config.evaluation).read_text(encoding="utf-8")).values()))
        step = found.get("step") or next(iter(curves.values()))[0][-1]
        axes.plot(step, found["loss"], "s", color="tab:red", label="held out")
        if "unigram_cross_entropy" in found:
            axes.axhline(
                found["unigram_cross_entropy"], color="grey", linestyle="--", label="unigram baseline"
            )
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
    axes.legend(fontsize=8)


def _draw_minimized(axes: Any, curves: dict[str, Curve]) -> None:
    for tag, curve in curves.items():
        axes.plot(*curve, linewidth=1, label=tag)
    axes.set(xlabel="step", ylabel="minimized loss")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_main(main)
