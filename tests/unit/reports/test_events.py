"""Event files come back as curves, sorted into layers, stages and the rest."""

from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer

from megatron_ext.reports.events import find_runs, layer_groups, plain_curves, read_curves, stages
from megatron_ext.training.logging.tensorboard_writer import TensorBoard


def _write(folder: Path) -> None:
    tensorboard = TensorBoard(str(folder))
    for step in range(1, 7):
        tensorboard.scalar("lm loss", 4.0 / step, step, consumed_samples=8 * step)
        tensorboard.scalar("curriculum/stage", 0 if step < 3 else 1, step)
        for layer in (11, 2):
            tensorboard.scalar(f"mlp_direct_loss/layer_{layer}", step * layer, step)
    tensorboard.close()


def test_curves_are_those_of_the_files(tmp_path: Path) -> None:
    _write(tmp_path)
    curves = read_curves(tmp_path)
    assert curves["lm loss"] == ([1, 2, 3, 4, 5, 6], pytest.approx([4 / step for step in range(1, 7)]))
    assert list(layer_groups(curves)) == ["mlp_direct_loss"]
    assert list(layer_groups(curves)["mlp_direct_loss"]) == [2, 11], "by number, not by name"
    assert layer_groups(curves)["mlp_direct_loss"][11][1] == [11, 22, 33, 44, 55, 66]
    assert list(plain_curves(curves)) == ["lm loss"]
    assert stages(curves) == [("stage 0", 1, 2), ("stage 1", 3, 6)]


def test_a_restart_in_the_same_second_replaces_what_came_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second differ in a counter; as text, "11" comes before "9".
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for begin, value in ((0, 9.0), (2, 1.0)):
        tensorboard = TensorBoard(str(tmp_path), iteration=begin, consumed_samples=8 * begin)
        for step in range(begin + 1, 5):
            tensorboard.scalar("lm loss", value, step, consumed_samples=8 * step)
        tensorboard.close()
    assert read_curves(tmp_path)["lm loss"] == ([1, 2, 3, 4], [9, 9, 1, 1])
    assert read_curves(tmp_path / "by_samples")["lm loss vs samples"] == ([8, 16, 24, 32], [9, 9, 1, 1])


def test_ple_tags_are_layers_too() -> None:
    curve = ([1], [0.5])
    assert layer_groups({"per-layer/update-ratio/layer_03": curve}) == {"per-layer/update-ratio": {3: curve}}


def test_a_stage_that_comes_again_is_a_part_of_its_own() -> None:
    curves = {"curriculum/stage": ([1, 2, 3], [0.0, 1.0, 0.0])}
    assert stages(curves) == [("stage 0", 1, 1), ("stage 1", 2, 2), ("stage 0", 3, 3)]
    assert stages({}) == []


def test_every_run_below_a_directory_is_found_once(tmp_path: Path) -> None:
    for name in ("layer_0", "layer_1"):
        _write(tmp_path / name)
    assert (tmp_path / "layer_0" / "by_samples").is_dir()
    assert find_runs(tmp_path) == {name: tmp_path / name for name in ("layer_0", "layer_1")}
    assert find_runs(tmp_path / "layer_0") == {"": tmp_path / "layer_0"}


def test_missing_files_and_tags_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--tensorboard-dir .*no TensorBoard files"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="--x .*no TensorBoard files"):
        read_curves(tmp_path, flag="--x")
    _write(tmp_path)
    with pytest.raises(ValueError, match="do not contain the tag 'other'"):
        read_curves(tmp_path, required="other")
