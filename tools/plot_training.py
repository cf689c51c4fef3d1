#!/usr/bin/env python3
"""Draws a run from its TensorBoard files: the losses, and one of the per-layer statistics. Needs the dev extra."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.cli import parse, run_main

Curve = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """What to read and where to draw."""

    tensorboard_dir: str
    """Directory that training wrote its event files to."""

    output: str
    """Picture to write; its ending says the format (png, svg, pdf)."""

    evaluation: str | None = None
    """JSON that tools/evaluate.py wrote: also draw the held-out loss and the unigram entropy."""

    statistic: str = "per-layer/update-ratio"
    """Tag of a per-layer statistic, without /layer_NN; left out where the run has none."""


def main() -> None:
    """Reads, draws, prints the picture's name."""
    config: PlotConfig = parse(
        PlotConfig,
        prog="tools/plot_training.py",
        description=str(__doc__),
        example="python tools/plot_training.py --tensorboard-dir runs/quickstart/tensorboard "
        "--evaluation runs/quickstart/evaluation.json --output docs/images/quickstart.png",
    )["config"]
    curves = read_curves(config.tensorboard_dir)
    draw(config, curves)
    print(config.output)


def read_curves(directory: str) -> dict[str, Curve]:
    """Tag -> curve.

    Raises:
        FileNotFoundError: no event files there.
        ValueError: they hold no losses.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(Path(directory).glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"--tensorboard-dir {directory}: no TensorBoard files there")
    events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }
    if "lm loss" not in curves:
        raise ValueError(f"--tensorboard-dir {directory}: its files hold no 'lm loss'")
    return curves


def draw(config: PlotConfig, curves: dict[str, Curve]) -> None:
    """Writes the picture.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("tools/plot_training.py: needs matplotlib, which the extra dev installs") from None
    layers = sorted(tag for tag in curves if re.fullmatch(re.escape(config.statistic) + r"/layer_\d+", tag))
    figure = Figure(figsize=(10 if layers else 5.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    _draw_losses(panels[0], config, curves)
    for number, tag in enumerate(layers):
        shade = 0.75 * (1 - number / len(layers))
        name = tag.rpartition("_")[2]
        panels[1].plot(*curves[tag], ".-", color=(shade, shade, shade), label=f"layer {name}")
    if layers:
        panels[1].set(xlabel="step", ylabel=config.statistic)
        panels[1].legend(fontsize=8)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=110)


def _draw_losses(axes: Any, config: PlotConfig, curves: dict[str, Curve]) -> None:
    axes.plot(*curves["lm loss"], color="tab:blue", linewidth=1, label="training")
    if "lm loss validation" in curves:
        axes.plot(*curves["lm loss validation"], "o-", color="tab:orange", markersize=4, label="validation")
    if config.evaluation is not None:
        found = next(iter(json.loads(Path(config.evaluation).read_text()).values()))
        axes.plot(curves["lm loss"][0][-1], found["loss"], "s", color="tab:red", label="held out")
        if "unigram_cross_entropy" in found:
            axes.axhline(
                found["unigram_cross_entropy"], color="grey", linestyle="--", label="unigram entropy"
            )
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_main(main)
