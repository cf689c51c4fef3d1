"""What a training left behind is read as it is, and the figures of hand-made trainings are those told by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.progressive.growth.rack import rack_of
from megatron_ext.progressive.growth.training_history import History, read_history, write_history
from megatron_ext.progressive.growth.trunk_strategy import (
    frozen_below,
    settings_by_layer,
    stack_descriptions,
    stack_treatments,
)
from megatron_ext.progressive.report.comparison_figures import compare_runs, loss_at, phase_figures
from megatron_ext.progressive.report.training_results import read_run
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.training.logging.tensorboard_writer import TensorBoard
from tests.unit.progressive.report_helpers import DATASET, GROWN, RACK, phase, write_grown, write_whole


def test_every_step_has_the_time_of_its_log_interval(tmp_path: Path) -> None:
    run = read_run("grown", write_grown(tmp_path))
    assert run.step_seconds == (1, 1, 3, 3, 0.5, 0.5, 0.5, 0.5)
    assert run.training_seconds == 10
    assert run.validation_by_seconds() == ([8, 10], [3, 2])
    assert run.validation_by_tokens() == ([256, 512], [3, 2])
    assert (run.rack, run.phases) == (RACK, GROWN)


def test_runs_are_compared_at_their_end_and_when_the_quickest_ended(tmp_path: Path) -> None:
    runs = [read_run("grown", write_grown(tmp_path / "g")), read_run("whole", write_whole(tmp_path / "w"))]
    found = compare_runs(runs, "whole")
    grown, whole = found.runs
    assert found.equal_seconds == 10
    assert (grown.equal_time_loss, whole.equal_time_loss) == (2, 3.5), "after 8 s 4, after 16 s 2"
    assert (grown.validation_loss, whole.validation_loss) == (2, 2)
    assert (grown.last_step_seconds, grown.last_step_ratio, whole.last_step_ratio) == (0.5, 0.25, 1)
    assert (grown.peak_memory_ratio, grown.tokens, whole.tokens) == (0.5, 512, None)
    assert (grown.trainable_parameters, whole.trainable_parameters) == (1000, 2000)
    assert grown.evaluation == {DATASET: {"loss": 2.25, "tokens": 500}}
    first, second = grown.phases
    assert (first.name, first.steps, first.step_seconds, first.validation_loss) == ("stack_0", 4, 2, 3)
    assert (second.layers, second.frozen_parameters, second.step_seconds) == (4, 1000, 0.5)
    assert loss_at(runs[1], 7.9) is None, "no evaluation yet"
    assert compare_runs(runs[:1]).equal_seconds is None
    with pytest.raises(ValueError, match="--reference other: must be one of the --runs grown, whole"):
        compare_runs(runs, "other")


def test_first_epoch_and_cached_steps_are_told_apart(tmp_path: Path) -> None:
    write_history(tmp_path, History(rack=RACK.first(1), finished=(phase("stack_0", 0, 8, ["trained"]),)))
    log = TensorBoard(str(tmp_path / "tensorboard"))
    # Logged every second step; the epoch ends within the second interval.
    for step, seconds, rate in ((2, 4.0, 0.0), (4, 3.0, 0.5), (6, 1.0, 1.0), (8, 1.0, 1.0)):
        log.scalar("iteration-time", seconds, step)
        log.scalar("cache/hit_rate", rate, step)
    log.close()
    run = read_run("x", tmp_path)
    figures = phase_figures(run, run.phases[0])
    assert (figures.first_epoch_step_seconds, figures.cached_step_seconds) == (4, 1)
    assert figures.step_seconds == (2 * 4 + 2 * 3 + 4 * 1) / 8


def test_a_restart_voids_what_came_after_its_checkpoint_and_unfinished_phases_are_left_out(
    tmp_path: Path,
) -> None:
    write_history(tmp_path, History(rack=RACK, finished=GROWN[:1]))
    for begin, seconds in ((0, 9.0), (2, 1.0)):
        log = TensorBoard(str(tmp_path / "tensorboard"), iteration=begin)
        for step in range(begin + 1, 8):
            log.scalar("iteration-time", seconds, step)
        log.close()
    run = read_run("x", tmp_path)
    assert run.step_seconds == (9, 9, 1, 1)
    assert run.rack == RACK.first(1)


def test_steps_after_the_last_logged_one_have_its_time(tmp_path: Path) -> None:
    write_history(tmp_path, History(rack=RACK.first(1), finished=GROWN[:1]))
    log = TensorBoard(str(tmp_path / "tensorboard"))
    log.scalar("iteration-time", 2.0, 3)
    log.close()
    assert read_run("x", tmp_path).step_seconds == (2, 2, 2, 2), "a plateau has ended it at step 4"


def test_without_event_files_the_phases_wall_time_stands_for_the_training_time(tmp_path: Path) -> None:
    write_history(tmp_path / "silent", History(rack=RACK, finished=GROWN))
    runs = [read_run("silent", tmp_path / "silent"), read_run("whole", write_whole(tmp_path / "whole"))]
    found = compare_runs(runs, "silent")
    silent = found.runs[0]
    assert (silent.training_seconds, silent.times_steps, silent.last_step_seconds) == (14, False, None)
    assert found.equal_seconds is None
    assert found.runs[1].last_step_ratio is None
    assert found.runs[1].peak_memory_ratio == 2


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"--runs x={tmp_path}: contains no progressive.json"):
        read_run("x", tmp_path)
    write_history(tmp_path, History(rack=RACK))
    with pytest.raises(ValueError, match="no phase of this run is finished yet"):
        read_run("x", tmp_path)
    write_grown(tmp_path)
    for content in ("[1]", '{"a": 1}', '{"a": {"loss": "high"}}'):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(ValueError, match="evaluation.json is damaged"):
            read_run("x", tmp_path)


@pytest.mark.parametrize(
    ("settings", "cached", "treatments"),
    [
        ({}, True, ["cached", "cached", "trained"]),
        ({}, False, ["frozen", "frozen", "trained"]),
        ({"building_mode": ("append", "prepend")}, True, ["frozen", "frozen", "trained"]),
        ({"trunk_strategy": "qlora"}, True, ["adapters", "adapters", "trained"]),
        ({"trunk_strategy": "trained"}, True, ["trained"] * 3),
        ({"enabled": False}, True, ["trained"] * 3),
    ],
)
def test_a_phase_notes_what_it_does_with_each_stack(
    settings: dict[str, object], cached: bool, treatments: list[str]
) -> None:
    config = ProgressiveConfig(target_stacks=3, **settings)  # type: ignore[arg-type]
    rack = rack_of(config, 3)
    below = frozen_below(rack, config, "newest") if cached else 0
    assert stack_treatments(rack, settings_by_layer(rack, config, "newest"), below) == treatments


def test_the_line_of_a_phase_names_the_stored_precision_and_what_trains() -> None:
    flags: dict[str, Any] = {"trunk_strategy": "qlora", "trunk_precision": "qlora", "target_stacks": 3}
    packed = ProgressiveConfig(**flags, new_stack_precision=("full", "half", "nvfp4"))
    rack = rack_of(packed, 3)
    plan = settings_by_layer(rack, packed, "newest")
    assert stack_descriptions(rack, plan, 0, "bfloat16") == [
        "nf4, frozen, with trained adapters",
        "nf4, frozen, with trained adapters",
        "bfloat16, trained",  # packed into four bits only once it belongs to the trunk
    ]
    cached = ProgressiveConfig(target_stacks=2)
    rack = rack_of(cached, 2)
    below = frozen_below(rack, cached, "newest")
    plan = settings_by_layer(rack, cached, "newest")
    assert stack_descriptions(rack, plan, below, "full") == ["full, frozen, output cached", "full, trained"]


def test_a_history_of_before_treatments_were_noted_is_read(tmp_path: Path) -> None:
    write_history(tmp_path, History(rack=RACK, finished=GROWN))
    path = tmp_path / "progressive.json"
    content = json.loads(path.read_text())
    for finished in content["finished"]:
        del finished["stack_treatments"], finished["stack_precisions"]
    path.write_text(json.dumps(content))
    assert [finished.stack_treatments for finished in read_history(tmp_path).finished] == [[], []]
