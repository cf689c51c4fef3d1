"""Document 001's files in a checkpoint and in `final/`, and the tool that validates them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file
from megatron_ext.npt.weights.state_files import replace_final
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from tests.integration.npt.npt_run_helpers import MULTI_LAYER, make_base, train, write_data
from tools.validate_checkpoint import main as validate

SAMPLES_A_STEP, MICRO_BATCH = 4, 2


def _run(folder: str, data: str) -> dict[str, torch.Tensor]:
    base = make_base(folder, data)
    flags = [*MULTI_LAYER, "--layer-weights", "1,0.25", "--teacher-cache-gb", "0.1", "--data-path", data]
    flags += ["--curriculum-stages", "teacher:2,mixed:2:0.3:0.6,student:9", "--lr-decay-style", "constant"]
    train(*flags, "--load", base, "--save", f"{folder}/run", "--save-steps", "2", "--train-iters", "4")
    return read_plain(f"{folder}/run/checkpoint-4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Directory of checkpoints, and what mcore's reader finds in the last of them."""
    folder = tmp_path_factory.mktemp("run")
    tensors = run_single(_run, str(folder), write_data(folder))
    return folder / "run", tensors


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_checkpoint_holds_the_documents_files_and_their_keys(
    run: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder = run[0] / "checkpoint-4"
    training, layers = _load(folder / "training_state.pt"), _load(folder / "multi_layer_state.pt")
    assert training["global_step"] == 4
    assert training["batch_count"] == 4 * SAMPLES_A_STEP // MICRO_BATCH
    assert training["optimizer_state_dict"]["step"] == 4
    assert training["optimizer_state_dict"]["param_groups"][0]["max_lr"] == 1e-2
    assert training["scheduler_state_dict"]["num_steps"] == 4 * SAMPLES_A_STEP
    assert training["scaler_state_dict"] == torch.amp.GradScaler("cpu", enabled=False).state_dict()
    assert layers["layers_to_train"] == [2, 3] and layers["layer_weights"] == {2: 1.0, 3: 0.25}
    assert [stage["name"] for stage in layers["curriculum_schedule"]] == ["teacher", "mixed", "student"]
    assert layers["curriculum_schedule"][1] == {
        "name": "mixed",
        "steps": 2,
        "attn_ratio": 0.3,
        "mlp_ratio": 0.6,
    }
    assert layers["current_stage_index"] == 2
    assert _load(run[0] / "checkpoint-2" / "multi_layer_state.pt")["current_stage_index"] == 1
    assert layers["teacher_cache"]["sequences"] == 4 * SAMPLES_A_STEP
    config = json.loads((folder / "config.json").read_text())
    assert config["np"]["np_rank"] == 4 and config["optimizer"]["lr"] == 1e-2
    assert config["training"]["train_iters"] == 4 and config["npt"]["layer_weights"] == "1,0.25"


def test_the_moments_are_where_the_optimizer_state_says(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stored = run[0] / "checkpoint-4", run[1]
    state = _load(folder / "training_state.pt")["optimizer_state_dict"]["state"]
    assert list(folder.glob(state["files"]))
    parameters = [name for name in stored if not name.startswith("optimizer.")]
    kinds = ("exp_avg", "exp_avg_sq")
    assert parameters
    assert all(state[kind].format(parameter=name) in stored for kind in kinds for name in parameters)


def test_np_weights_are_the_checkpoints_own_tensors(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    weights = _load(run[0] / "checkpoint-4" / "npt_weights.pt")
    stored = {name: tensor for name, tensor in run[1].items() if not name.startswith("optimizer.")}
    by_size = sorted(float(tensor.double().norm()) for tensor in stored.values())
    assert len(weights) == len(stored) == 2 * 4
    assert sorted(float(tensor.double().norm()) for tensor in weights.values()) == by_size


def test_final_holds_the_weights_of_the_last_step_and_nothing_is_left_beside_it(
    run: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    weights, settings = read_np_weight_file(str(run[0] / "final" / "npt_weights.pt"))
    expected = _load(run[0] / "checkpoint-4" / "npt_weights.pt")
    safe = load_file(run[0] / "final" / "npt_weights.safetensors")
    for other in (weights, safe):
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[name], expected[name]) for name in expected)
    assert settings is not None and settings.np_rank == 4
    assert json.loads((run[0] / "final" / "config.json").read_text())["global_step"] == 4
    assert sorted(path.name for path in run[0].iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "final",
        "latest_checkpointed_iteration.txt",
    ]
    assert find_checkpoint(str(run[0])) == run[0] / "checkpoint-4"


def _final_again(root: str, weights: dict[str, torch.Tensor]) -> list[str]:
    """What lies in the directory after `final/` has been written in the wake of a kill between its two renames."""
    (Path(root) / "final").rename(Path(root) / ".replaced.final")
    (Path(root) / ".writing.final").mkdir()
    replace_final(Path(root), weights, NPTModuleConfig(), {})
    return sorted(path.name for path in Path(root).iterdir())


def test_a_kill_while_final_is_written_leaves_nothing_half(tmp_path: Path) -> None:
    weights = {"layer_0_np.gate.A": torch.ones(2, 3)}
    replace_final(tmp_path, weights, NPTModuleConfig(), {})
    assert _final_again(str(tmp_path), weights) == ["final"]
    assert torch.equal(_load(tmp_path / "final" / "npt_weights.pt")["layer_0_np.gate.A"], torch.ones(2, 3))


def test_a_checkpoint_is_valid(
    run: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate([str(run[0] / "checkpoint-4")]) == 0
    output = capsys.readouterr().out
    assert "step: 4\n" in output and "NPT layers: 2, 3\n" in output and "stage: student (3 of 3)\n" in output
    assert "files match" in output and output.endswith(": valid\n")


def test_a_directory_of_the_document_is_valid_without_checksums(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("npt_weights.pt", "training_state.pt", "multi_layer_state.pt"):
        shutil.copy(run[0] / "checkpoint-4" / name, tmp_path)
    assert validate(["--checkpoint", str(tmp_path)]) == 0
    assert "checksums: none" in capsys.readouterr().out


def test_of_a_directory_of_checkpoints_the_newest_complete_one_is_validated(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate([str(run[0])]) == 0
    output = capsys.readouterr().out
    assert "step: 4\n" in output and output.endswith(f"{run[0] / 'checkpoint-4'}: valid\n")
    shutil.copytree(run[0], tmp_path / "run")
    unfinished = (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-6")
    (unfinished / "checksums.json").unlink()
    assert validate([str(tmp_path / "run")]) == 1
    output = capsys.readouterr().out
    assert (
        "step: 4\n" in output and f"problem: {unfinished} is incomplete: it has no checksums.json\n" in output
    )


def test_of_the_documents_plain_checkpoints_the_newest_is_validated(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("npt_weights.pt", "training_state.pt", "multi_layer_state.pt"):
            shutil.copy(run[0] / "checkpoint-4" / name, tmp_path / f"checkpoint-{step}")
    assert validate([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("checkpoint-10: valid\n")


def test_a_directory_without_checkpoints_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "layer_3_20250910_180000").mkdir()
    with pytest.raises(FileNotFoundError, match="must be a checkpoint or .*in layer_\\*/checkpoints"):
        validate([str(tmp_path)])


class _Executes:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def _remove(folder: Path) -> None:
    (folder / "npt_weights.pt").unlink()


def _truncate(folder: Path) -> None:
    path = folder / "training_state.pt"
    path.write_bytes(path.read_bytes()[:-20])


def _execute(folder: Path) -> None:
    torch.save({"layers_to_train": _Executes()}, folder / "multi_layer_state.pt")


def _not_finite(folder: Path) -> None:
    torch.save({"layer_2_np.gate.B": torch.tensor([float("nan")])}, folder / "npt_weights.pt")


def _key(folder: Path) -> None:
    torch.save({"global_step": 4}, folder / "training_state.pt")


def _moments(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "missing: npt_weights.pt": _remove,
    "cannot be loaded: training_state.pt": _truncate,
    "cannot be loaded: multi_layer_state.pt": _execute,
    "layer_2_np.gate.B is not finite": _not_finite,
    "training_state.pt: optimizer_state_dict, scheduler_state_dict missing": _key,
    "its content does not match checksums.json": _moments,
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_damage_is_named(
    problem: str,
    run: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(run[0] / "checkpoint-4", folder)
    DAMAGE[problem](folder)
    assert validate([str(folder)]) == 1
    output = capsys.readouterr().out
    assert problem in output and "executed" not in output


def test_a_directory_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--checkpoint .*: no such directory"):
        validate([str(tmp_path / "nothing")])
