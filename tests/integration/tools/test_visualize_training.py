"""tools/visualize_training.py draws what a run has logged, of any family, as a page or as pictures."""

import base64
import re
import sys
from pathlib import Path

import pytest

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.training.logging.tensorboard_writer import TensorBoard
from tools.visualize_training import main

TAGS = ("lm loss", "lm loss validation", "lm loss validation ppl", "grad-norm")


def _write(folder: Path, group: str) -> Path:
    tensorboard = TensorBoard(str(folder))
    for step in range(1, 9):
        for tag in TAGS:
            tensorboard.scalar(tag, 1.0 / step, step, step)
        for layer in (4, 5):
            tensorboard.scalar(f"{group}/layer_{layer:02d}", layer / step, step)
        tensorboard.scalar("curriculum/stage", float(step > 4), step)
    tensorboard.close()
    return folder


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    main_guard(main)()


def _pictures(page: Path) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page.read_text())]


@pytest.mark.parametrize("flag", ["--tensorboard-dir", "--logdir"])
@pytest.mark.parametrize(
    ("group", "title"),
    [
        ("mlp_direct_loss", "Direct MLP loss per layer"),
        ("per-layer/update-ratio", "Update / residual stream"),
        ("my/value", "my/value, layers"),
    ],
)
def test_a_page_has_losses_then_heat_maps_then_curves_and_the_stages_in_each(
    flag: str, group: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logdir, page = _write(tmp_path / "run", group), tmp_path / "new" / "page.html"
    _run(monkeypatch, flag, logdir, "--html", page)
    pictures = _pictures(page)
    assert len(pictures) == 4, "losses together, perplexity, one heat map, gradient norm"
    assert ">lm loss validation</text>" in pictures[0]
    assert all(f">{text}</text>" in pictures[2] for text in (title, "4", "5", "layer"))
    assert ">Gradient norm</text>" in pictures[3]
    assert all(">stage 0</text>" in picture and ">stage 1</text>" in picture for picture in pictures)


def test_a_page_lists_its_sections_and_its_captions_explain_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    _run(monkeypatch, "--tensorboard-dir", _write(tmp_path / "run", "per-layer/update-ratio"), "--html", page)
    text = page.read_text()
    assert re.findall(r'<a href="#section-\d">([^<]+)</a>', text) == [
        "Losses",
        "Per-layer embedding",
        "Learning rate and norms",
    ]
    assert "the relative size of PLE&#x27;s contribution to a layer" in text
    assert "Tag: per-layer/update-ratio/layer_N." in text


def test_constant_values_are_one_line_and_a_single_stage_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorboard, page = TensorBoard(str(tmp_path / "run")), tmp_path / "page.html"
    for step in (1, 2, 3):
        for tag, value in (("lm loss", 1.0 / step), ("batch-size", 4.0), ("curriculum/stage", 0.0)):
            tensorboard.scalar(tag, value, step, step)
    tensorboard.close()
    _run(monkeypatch, "--logdir", tmp_path / "run", "--html", page)
    (picture,) = _pictures(page)
    assert "stage 0" not in picture
    assert "<p>Constant: batch-size 4</p>" in page.read_text()
    assert capsys.readouterr().out.splitlines() == ["Constant: batch-size 4", f"{page}: 1 charts"]


def test_several_runs_give_a_folder_of_pictures_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer_0", "layer_1"):
        _write(tmp_path / "logs" / name, "v_a_norm")
    _run(monkeypatch, "--logdir", tmp_path / "logs", "--output-dir", tmp_path / "out", "--tags", "v_a|grad")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.svg")}
    files = ("Gradient_norm.svg", "Norm_of_v_a_layers.svg")
    assert written == {f"{name}/{file}" for name in ("layer_0", "layer_1") for file in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--logdir", "{tmp}"], "--html, --output-dir: give exactly one of them"),
        (["--logdir", "{tmp}/none", "--html", "{tmp}/x.html"], "--tensorboard-dir"),
        (["--logdir", "{tmp}/run", "--html", "{tmp}/x.html", "--tags", "["], "--tags ["),
        (
            ["--logdir", "{tmp}/run", "--html", "{tmp}/x.html", "--tags", "nothing"],
            "no scalars that match --tags nothing",
        ),
        (["--logdir", "{tmp}/run", "--html", "{tmp}/run"], "--html"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write(tmp_path / "run", "x")
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, *(text.format(tmp=tmp_path) for text in arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "x.html").exists()
