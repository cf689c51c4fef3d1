"""A progressive training from the command line: trunk strategies, phases, ends before the end, and wrong input."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.testing.run_single import run_single
from tests.integration.progressive.progressive_run_helpers import losses_of, stored, train, write_data

Tensors = dict[str, torch.Tensor]
STEPS = ("--stack-steps", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def whole_and_in_pieces(data: str, folder: str) -> tuple[list[Tensors], list[str]]:
    """The same training at once, and left at several steps; dropout needs the random numbers too."""
    flags: tuple[str, ...] = (*STEPS, "--target-stacks", "3", "--joint-steps", "2", "--growth-init", "copy")
    flags = (*flags, "--hidden-dropout", "0.1", "--trunk-strategy", "qlora")
    train(data, f"{folder}/whole", *flags)
    outputs = []
    for stop in ("2", "4", "6", None):
        more = ("--exit-interval", stop) if stop else ()
        outputs.append(train(data, f"{folder}/pieces", *flags, *more)[1])
    found = [stored(f"{folder}/{name}", "progressive_rack") for name in ("whole", "pieces")]
    # As a kill leaves it that comes after the last checkpoint, before the phase counts as finished.
    history = Path(folder, "pieces", "progressive.json")
    content = json.loads(history.read_text())
    history.write_text(json.dumps({**content, "finished": content["finished"][:-1]}))
    shutil.rmtree(Path(folder, "pieces", "progressive_rack"))
    train(data, f"{folder}/pieces", *flags)
    return [*found, stored(f"{folder}/pieces", "progressive_rack")], outputs


def test_a_training_that_is_left_inside_and_between_stacks_ends_with_the_same_bits(
    data: str, tmp_path: Path
) -> None:
    (whole, *others), outputs = run_single(whole_and_in_pieces, data, str(tmp_path))
    for pieces in others:
        assert whole.keys() == pieces.keys()
        for name, value in whole.items():
            assert torch.equal(value, pieces[name]), name
    assert [len(losses_of(output)) for output in outputs] == [2, 2, 2, 5]


def test_a_length_in_epochs_is_that_of_every_stack(data: str, tmp_path: Path) -> None:
    # 54 documents of 40 tokens to train on: 134 sequences of 16, of which a tenth makes 3 steps of 4.
    _, output = run_single(train, data, str(tmp_path), "--target-stacks", "2", "--num-epochs", "0.1")
    assert len(losses_of(output)) == 2 * 3


def stack_by_stack(data: str, folder: str) -> list[Tensors]:
    flags: tuple[str, ...] = (*STEPS, "--trunk-strategy", "qlora", "--trunk-precision", "qlora")
    for target in ("1", "2", "3"):
        train(data, f"{folder}/apart", *flags, "--target-stacks", target)
    train(data, f"{folder}/at_once", *flags, "--target-stacks", "3")
    phases = [stored(f"{folder}/at_once", f"progressive_stack_{i}") for i in range(3)]
    return [stored(f"{folder}/apart", "progressive_stack_2"), *phases]


def test_qlora_trunk_trains_adapters_only_and_growing_by_three_commands_equals_one(
    data: str, tmp_path: Path
) -> None:
    apart, _, second, third = run_single(stack_by_stack, data, str(tmp_path))
    for name, value in third.items():
        assert torch.equal(value, apart[name]), name
    moved = {name for name, value in second.items() if name in third and not torch.equal(value, third[name])}
    trunk = [name for name in second if name.startswith(("decoder.layers.0.", "decoder.layers.1."))]
    for name in trunk:
        if "_extra_state" not in name:
            assert (name in moved) == (".adapters." in name), name


def plateau_and_joint(
    data: str, folder: str
) -> tuple[str, Tensors, Tensors, dict[str, Any], dict[str, float]]:
    flags: tuple[str, ...] = (
        "--stack-steps",
        "6",
        "--target-stacks",
        "2",
        "--joint-steps",
        "1",
        "--tensorboard-dir",
        f"{folder}/logs",
    )
    flags = (*flags, "--plateau-patience", "2", "--plateau-min-delta", "9")
    _, output = train(data, f"{folder}/save", *flags)
    history = json.loads(Path(folder, "save", "progressive.json").read_text())
    return (
        output,
        stored(f"{folder}/save", "progressive_stack_1"),
        stored(f"{folder}/save", "progressive_joint"),
        history,
        _last_scalars(Path(folder, "logs")),
    )


def _last_scalars(folder: Path) -> dict[str, float]:
    """The last value of each tag, of the phases' files together.

    Each file is read by itself. TensorBoard reads files in the order of their names, which for phases that begin within
    one second end in a counter of the process, and 10 sorts before 9.
    """
    found: dict[str, tuple[int, float]] = {}
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            last = events.Scalars(tag)[-1]
            found[tag] = max(found.get(tag, (0, 0.0)), (last.step, last.value))
    return {tag: value for tag, (_, value) in found.items()}


def test_a_plateau_ends_a_stack_and_the_joint_phase_moves_everything(data: str, tmp_path: Path) -> None:
    output, last, joint, history, logged = run_single(plateau_and_joint, data, str(tmp_path))
    assert output.count("plateau at step") == 2
    assert [phase["iteration"] for phase in history["finished"]] == [4, 8, 9]
    assert [phase["consumed_samples"] for phase in history["finished"]] == [16, 32, 36]
    assert history["finished"][2]["frozen_parameters"] == 0
    done = [phase["stack_treatments"] for phase in history["finished"]]
    assert done == [["trained"], ["cached", "trained"], ["trained", "trained"]]
    assert history["finished"][1]["stack_precisions"] == ["full", "full"]
    for name, value in last.items():
        if name.startswith(("decoder.layers", "embedding")) and "_extra_state" not in name:
            assert not torch.equal(value, joint[name]), name
    total = sum(value.numel() for name, value in joint.items() if not name.startswith("optimizer"))
    assert logged["progressive/trainable_parameters"] == total
    assert logged["progressive/total_tokens"] == 9 * 4 * 16
    assert {"progressive/loss_stack_0", "progressive/loss_stack_1", "progressive/loss_joint"} <= logged.keys()


def end_to_end(data: str, folder: str) -> tuple[str, Tensors]:
    _, output = train(data, folder, *STEPS, "--target-stacks", "2", "--no-enabled")
    return output, stored(folder, "progressive_rack")


def test_without_growth_all_stacks_train_end_to_end_for_as_many_steps(data: str, tmp_path: Path) -> None:
    output, rack = run_single(end_to_end, data, str(tmp_path))
    assert len(losses_of(output)) == 6
    assert "decoder.layers.3.mlp.linear_fc1.weight" in rack
    assert not any("adapters" in name for name in rack)


def masked_training(data: str, folder: str) -> tuple[str, str]:
    flags: tuple[str, ...] = (
        *STEPS,
        "--target-stacks",
        "2",
        "--training-objective",
        "mlm",
        "--time-interpretation",
        "input",
    )
    flags = (*flags, "--eval-iters", "1", "--time-embedding-dim", "8")
    cached = train(data, f"{folder}/cached", *flags, "--cache-dir", f"{folder}/cache")[1]
    again = train(data, f"{folder}/again", *flags, "--cache-dir", f"{folder}/cache")[1]
    return cached, again


def test_masked_training_with_time_and_a_cached_trunk_repeats_itself(data: str, tmp_path: Path) -> None:
    cached, again = run_single(masked_training, data, str(tmp_path))
    assert losses_of(cached) == losses_of(again)
    assert "lm loss" in cached.partition("validation at step 3")[2]


MISTAKES = {
    (
        "--target-stacks",
        "3",
        "--cache-dir",
        "CACHE",
    ): "--cache-dir .*another: belongs to another run",
    (
        "--target-stacks",
        "3",
        "--save",
        "NEW",
        "--cache-dir",
        "CACHE",
    ): "--cache-dir .* belongs to another run",
    (
        "--target-stacks",
        "3",
        "--save",
        "NEW",
        "--training-objective",
        "mlm",
        "--mask-token-id",
        "99",
    ): "-id 99: must",
    (
        "--target-stacks",
        "3",
        "--save",
        "JOINT",
    ): "--target-stacks 3: no stack can be added in .*JOINT, because the joint phase of its 2 stacks",
    (
        "--target-stacks",
        "2",
        "--save",
        "NEW",
        "--cache-dir",
        "CACHE",
        "--train-embedding",
    ): "nothing would be cached",
    ("--target-stacks", "1"): "--target-stacks 1: must be at least 2, the number of stacks already in",
    (
        "--target-stacks",
        "3",
        "--building-mode",
        "prepend",
    ): "--building-mode.*must describe the stacks already in",
    (
        "--target-stacks",
        "3",
        "--new-stack-precision",
        "half",
    ): "--new-stack-precision must describe the stacks already in",
    ("--target-stacks", "2", "--ffn-hidden-size", "40"): "--ffn-hidden-size 40: .* was made with",
    ("--target-stacks", "3", "--training-objective", "mlm"): "--training-objective mlm: the stacks in .* clm",
    (
        "--target-stacks",
        "3",
        "--load",
        "elsewhere",
    ): "--load elsewhere: not supported, .* continues in --save",
    (
        "--target-stacks",
        "3",
        "--no-untie-embeddings-and-output-weights",
    ): "--train-embedding: required without",
    (
        "--target-stacks",
        "3",
        "--training-objective",
        "custom",
    ): "custom: requires targets, which indexed datasets",
    ("--target-stacks", "3", "--pipeline-model-parallel-size", "3"): "--pipeline-model-parallel-size 3",
    ("--target-stacks", "3", "--qlora-rank", "0"): "--qlora-rank 0: must be at least 1",
    ("--target-stacks", "3", "--new-stack-precision", "int3"): "--new-stack-precision int3: must be one of",
    ("--target-stacks", "13"): "--target-stacks 13: must be at most --max-stacks 12",
    ("--target-stacks", "3", "--num-layers", "6"): "--num-layers 6: omit it; the number follows from",
    (
        "--target-stacks",
        "3",
        "--train-iters",
        "6",
    ): "--stack-steps: cannot be combined with --train-iters",
    (
        "--target-stacks",
        "3",
        "--trunk-strategy",
        "qlora",
        "--no-qlora-enabled",
    ): "--trunk-strategy qlora: trains",
}


def mistakes(data: str, folder: str) -> tuple[list[str], bool]:
    """What each is told as, with a finished training of two stacks there, and whether nothing was touched."""
    save = f"{folder}/save"
    train(data, save, "--stack-steps", "1", "--target-stacks", "2")
    joint = Path(folder, "JOINT")
    shutil.copytree(save, joint)
    history = json.loads((joint / "progressive.json").read_text())
    history["finished"].append({**history["finished"][-1], "name": "progressive_joint"})
    (joint / "progressive.json").write_text(json.dumps(history))
    Path(folder, "another").mkdir()
    Path(folder, "another", "cache.json").write_text('{"identity": {"seed": 7}}')
    places = {"CACHE": f"{folder}/another", "NEW": f"{folder}/new", "JOINT": str(joint)}
    before = {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    told = []
    for flags in MISTAKES:
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error):
                train(data, save, "--stack-steps", "1", *(places.get(flag, flag) for flag in flags))
            told.append("no error")
        except ValueError as mistake:
            told.append(str(mistake))
        except SystemExit as end:
            told.append(f"{error.getvalue().strip()} (exit code {end.code})")
    after = {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    return told, before == after


def test_a_mistake_is_told_in_one_line_and_nothing_is_touched(data: str, tmp_path: Path) -> None:
    told, untouched = run_single(mistakes, data, str(tmp_path))
    assert untouched
    for text, expected in zip(told, MISTAKES.values(), strict=True):
        assert re.search(expected, text), text
        assert len(text.strip().splitlines()) == 1
        assert "(exit code" not in text or text.endswith("(exit code 2)")
