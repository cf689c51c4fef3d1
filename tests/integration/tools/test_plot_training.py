"""The picture of a run is drawn from what its TensorBoard files hold."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.reports.events import read_curves
from megatron_ext.training.logging.tensorboard_writer import TensorBoard
from tools.plot_training import PlotConfig, draw, main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """TensorBoard files of three steps and an evaluation."""
    tensorboard = TensorBoard(str(tmp_path / "tensorboard"))
    for step in (1, 2, 3):
        tensorboard.scalar("lm loss", 4.0 / step, step)
        for layer in (0, 1):
            tensorboard.scalar(f"per-layer/update-ratio/layer_{layer:02d}", 0.5, step)
    tensorboard.scalar("lm loss validation", 2.0, 3)
    tensorboard.close()
    found = {"held_out": {"loss": 2.5, "perplexity": 12.2, "unigram_cross_entropy": 6.0}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    return tmp_path


def test_curves_are_those_of_the_files(run: Path) -> None:
    curves = read_curves(str(run / "tensorboard"))
    assert curves["lm loss"] == ([1, 2, 3], pytest.approx([4.0, 2.0, 4.0 / 3]))
    assert curves["lm loss validation"] == ([3], [2.0])


@pytest.mark.parametrize("statistic", ["per-layer/update-ratio", "not/there"])
def test_the_picture_holds_the_losses_and_the_statistic_if_there_is_one(run: Path, statistic: str) -> None:
    config = PlotConfig(
        tensorboard_dir=str(run / "tensorboard"),
        output=str(run / "new" / "picture.svg"),
        evaluation=str(run / "evaluation.json"),
        statistic=statistic,
    )
    draw(config, read_curves(config.tensorboard_dir))
    picture = Path(config.output).read_text()
    # matplotlib leaves the text of every label as a comment in an SVG.
    for label in ("training", "validation", "held out", "unigram baseline"):
        assert f"<!-- {label} -->" in picture
    assert ("<!-- layer 01 -->" in picture) == (statistic == "per-layer/update-ratio")


def test_an_npt_run_shows_the_loss_that_it_minimizes_beside_the_cross_entropy_if_there_is_one(
    tmp_path: Path,
) -> None:
    minimized: dict[str, Any] = {"npt loss": ([1, 2], [0.4, 0.2]), "fidelity_loss": ([1, 2], [0.3, 0.1])}
    config = PlotConfig(tensorboard_dir="none", output=str(tmp_path / "picture.svg"))
    for curves in ({**minimized, "lm loss": ([1, 2], [3.0, 2.0])}, minimized):
        draw(config, curves)
        picture = Path(config.output).read_text()
        assert all(f"<!-- {tag} -->" in picture for tag in minimized)
        assert ("<!-- training -->" in picture) == ("lm loss" in curves)


@pytest.mark.parametrize(("told", "step"), [({"step": 2}, 2), ({}, 3)])
def test_the_held_out_mark_stands_at_the_step_that_was_evaluated(
    run: Path, told: dict[str, int], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"held_out": {"loss": 2.5, "perplexity": 12.2, **told}}
    (run / "evaluation.json").write_text(json.dumps(found))
    figures: list[Any] = []
    save = Figure.savefig

    def recorded(figure: Any, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", recorded)
    config = PlotConfig(
        tensorboard_dir=str(run / "tensorboard"),
        output=str(run / "picture.svg"),
        evaluation=str(run / "evaluation.json"),
    )
    draw(config, read_curves(config.tensorboard_dir))
    (mark,) = [line for line in figures[0].axes[0].lines if line.get_label() == "held out"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([step], [2.5])


def test_a_directory_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--tensorboard-dir"):
        read_curves(str(tmp_path), required="lm loss")
    tensorboard = TensorBoard(str(tmp_path))
    tensorboard.scalar("other", 1.0, 1)
    tensorboard.close()
    with pytest.raises(ValueError, match="'lm loss'"):
        read_curves(str(tmp_path), required="lm loss")


@pytest.mark.parametrize("flag", ["--tensorboard-dir", "--logdir"])
def test_the_runs_directory_is_given_as_to_visualize_training(
    run: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = run / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["tool", flag, str(run / "tensorboard"), "--output", str(picture)])
    main_guard(main)()
    assert capsys.readouterr().out == f"{picture}\n"
    assert "<!-- training -->" in picture.read_text()
