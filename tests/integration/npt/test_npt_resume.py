"""An NPT run that stops and goes on: to the bit as if it had never stopped, or with what the command line changes."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.npt.weights.npt_resume import stored_run
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.warm_python.warm_server import warm_variables
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from tests.integration.npt.npt_run_helpers import MULTI_LAYER, ROOT, make_base, train, write_data

CURRICULUM = ["--curriculum-stages", "teacher:2,mixed:3:0.3:0.6,student:3"]


def _read(folder: str, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Model and moments; NP weights."""
    path = f"{folder}/checkpoint-{step}"
    return read_plain(path), torch.load(f"{path}/npt_weights.pt", weights_only=True)


def _straight_and_resumed(folder: str, data: str, more: list[str]) -> dict[str, Any]:
    base = make_base(folder, data)
    flags = [*MULTI_LAYER, *CURRICULUM, "--data-path", data, "--train-iters", "8", "--save-steps", "4", *more]
    flags += ["--base-checkpoint", base]
    assert train(*flags, "--save", f"{folder}/straight")[0] == 0
    stopped = [*flags, "--save", f"{folder}/stopped", "--load", f"{folder}/stopped"]
    outputs = [train(*stopped, "--exit-interval", "4")[1], train(*stopped)[1], train(*stopped)[1]]
    return {
        "outputs": outputs,
        "states": [_read(f"{folder}/{name}", 8) for name in ("straight", "stopped")],
        "finals": [
            torch.load(f"{folder}/{name}/final/npt_weights.pt", weights_only=True)
            for name in ("straight", "stopped")
        ],
    }


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.mark.parametrize(
    ("processes", "more"), [(1, ["--teacher-cache-gb", "0.1"]), (2, TP2)], ids=["TP1", "TP2"]
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(
    processes: int, more: list[str], tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    found = run_distributed(_straight_and_resumed, processes, str(tmp_path), data, more)[0]
    stopped, resumed, again = found["outputs"]
    assert "stopped after step 4" in stopped and "the run continues after step 4" in resumed
    assert "training is already complete: step 8 of 8" in again and "step 9" not in again
    assert "--override-opt-param-scheduler" not in again, "NPT runs always use the command line's schedule"
    for straight, other in zip(*found["states"], strict=True):
        assert straight and _equal(straight, other)
    assert {name.split(".")[0] for name in found["states"][0][0]} == {"optimizer", "decoder"}
    assert _equal(*found["finals"]) and _equal(found["finals"][0], found["states"][0][1])


def _changed(folder: str, data: str) -> dict[str, Any]:
    """Goes on from step 4 of 8 in every way."""
    base = make_base(folder, data)
    flags = [*MULTI_LAYER, *CURRICULUM, "--data-path", data, "--lr-decay-style", "constant"]
    train(*flags, "--load", base, "--train-iters", "4", "--save", f"{folder}/run")
    ways = {
        "lr": ["--lr", "3e-4"],
        "batch": ["--global-batch-size", "8", "--lr-decay-style", "linear"],
        "curriculum": ["--curriculum-stages", "student:40"],
        "layers": ["--npt-layers", "1,2", "--allow-layer-mismatch"],
        "mismatch": ["--npt-layers", "1,2"],
        "same layers": ["--npt-layers", "-2,-1"],
        "nothing shared": ["--npt-layers", "0", "--allow-layer-mismatch"],
    }
    found: dict[str, Any] = {}
    for name, more in ways.items():
        save = f"{folder}/{name}"
        given = [
            *flags,
            "--load",
            f"{folder}/run",
            "--train-iters",
            "6",
            "--save",
            save,
            "--save-steps",
            "5",
            *more,
        ]
        try:
            found[name] = train(*given)[1]
        except ValueError as error:
            found[name] = str(error)
    checkpoint = Path(folder, "run", "checkpoint-4")
    stored = read_run_config(str(checkpoint))
    found["stored"] = [stored_run(checkpoint, stored, {"additional_steps": 3})["npt"]["layer_losses"]]
    del stored["npt"]["layer_losses"]
    found["stored"].append(stored_run(checkpoint, stored, {"additional_steps": 3})["npt"]["layer_losses"])
    found["additional"] = train(
        "--load", f"{folder}/run/checkpoint-4", "--additional-steps", "3", "--lr", "1e-3"
    )[1]
    for name, path in (
        ("before", "run/checkpoint-4"),
        ("after", "layers/checkpoint-5"),
        ("more", "run/checkpoint-7"),
    ):
        states = ("npt_weights", "training_state", "multi_layer_state")
        found[name] = [torch.load(f"{folder}/{path}/{state}.pt", weights_only=True) for state in states]
    return found


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("changed")
    return run_single(_changed, str(folder), write_data(folder))


def _rates(output: str) -> list[str]:
    return re.findall(r"step (\d)/\d .*? lr (\S+)", output)


def test_the_command_lines_learning_rate_counts(changed: dict[str, Any]) -> None:
    assert _rates(changed["lr"]) == [("5", "3.000e-04"), ("6", "3.000e-04")]


def test_with_another_batch_size_the_schedule_is_where_the_steps_are(changed: dict[str, Any]) -> None:
    # Linear from 1e-2 to 0 in six steps, of which four are done.
    assert _rates(changed["batch"]) == [("5", "3.333e-03"), ("6", "1.667e-03")]


def test_another_curriculums_stage_follows_from_the_step(changed: dict[str, Any]) -> None:
    assert "step 6/6" in changed["curriculum"]


def test_the_same_layers_by_other_words_are_the_same(changed: dict[str, Any]) -> None:
    assert "the run continues after step 4" in changed["same layers"]
    assert "warning" not in changed["same layers"]


def test_other_layers_are_refused_unless_what_fits_is_asked_for(changed: dict[str, Any]) -> None:
    assert re.match(
        r"--npt-layers 1,2: the checkpoint \S+checkpoint-4 has NPT layers 2,3; add --allow-layer-mismatch",
        changed["mismatch"],
    )
    assert changed["nothing shared"].endswith("at least one layer must be common to both")


def test_with_other_layers_the_shared_ones_go_on_and_the_optimizer_starts_anew(
    changed: dict[str, Any],
) -> None:
    warning = next(line for line in changed["layers"].splitlines() if line.startswith("warning"))
    assert "loading NP weights for layers 2 only" in warning
    before, after = changed["before"], changed["after"]
    assert {key.split("_")[1] for key in after[0]} == {"1", "2"}
    for key, tensor in after[0].items():
        # One step of Adam at this rate moves no weight further than the rate.
        assert key not in before[0] or (tensor - before[0][key]).abs().max() < 1.1e-2
    assert after[1]["global_step"] == 5 and after[1]["optimizer_state_dict"]["step"] == 1
    assert before[1]["optimizer_state_dict"]["step"] == 4
    assert after[2]["layers_to_train"] == [1, 2]


def test_additional_steps_take_the_runs_configuration_and_the_flags_that_are_given(
    changed: dict[str, Any],
) -> None:
    assert _rates(changed["additional"]) == [(step, "1.000e-03") for step in "567"]
    weights, training, layers = changed["more"]
    assert training["global_step"] == 7 and weights.keys() == changed["before"][0].keys()
    assert layers["curriculum_schedule"] == changed["before"][2]["curriculum_schedule"]
    assert (changed["before"][2]["current_stage_index"], layers["current_stage_index"]) == (1, 2)


def test_additional_steps_of_a_run_that_stored_no_form_of_the_losses_keep_the_documents(
    changed: dict[str, Any],
) -> None:
    assert changed["stored"] == ["local", "document"]


def _started(folder: str, data: str) -> None:
    flags = [*MULTI_LAYER, *CURRICULUM, "--data-path", data, "--load", make_base(folder, data)]
    train(*flags, "--train-iters", "2", "--save", f"{folder}/run/checkpoints")


def test_the_resume_script_needs_a_checkpoint_only_and_flags_win(tmp_path: Path) -> None:
    run_single(_started, str(tmp_path), write_data(tmp_path))
    script = str(ROOT / "examples" / "npt" / "resume_training.sh")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [
            "bash",
            script,
            "run/checkpoints/checkpoint-2",
            "3",
            "--learning_rate",
            "5e-4",
            "--lr-decay-style",
            "constant",
        ],
        cwd=tmp_path,
        env={**environment, **warm_variables(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert _rates(result.stdout) == [(step, "5.000e-04") for step in "345"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[cf]*")) == [
        "checkpoint-2",
        "checkpoint-5",
        "final",
    ]


def _from_base(folder: str, data: str) -> list[list[str]]:
    flags = [*MULTI_LAYER, "--data-path", data, "--train-iters", "2", "--log-interval", "1"]
    flags += ["--load", make_base(folder, data)]
    outputs = [train(*flags, *more)[1] for more in ([], ["--finetune"])]
    return [re.findall(r"step +\d+/2 \| lm loss [\d.]+", output) for output in outputs]


def test_training_from_a_base_model_is_the_same_with_and_without_finetune(tmp_path: Path) -> None:
    plain, finetuned = run_single(_from_base, str(tmp_path), write_data(tmp_path))
    assert len(plain) == 2 and plain == finetuned
