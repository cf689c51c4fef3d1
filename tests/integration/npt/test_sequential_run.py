"""Sequential training: what a layer's run trains and on what data, the files that it leaves, and what is refused."""

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.npt import NPTModel
from megatron_ext.npt.objective.npt_run_config import mode_defaults
from megatron_ext.npt.runs.sequential_files import layer_of_np_key
from megatron_ext.npt.runs.sequential_run import layer_logging
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.conftest import SequentialRun
from tests.integration.npt.kill_and_resume import differences
from tests.integration.npt.npt_run_helpers import DATA, make_base, train
from tests.unit.interop.hf_models import alone

Tensors = dict[str, torch.Tensor]
IDS = [5, 9, 2, 7, 7, 1, 30, 4]


def _weights(path: Path) -> Tensors:
    found: Tensors = torch.load(path, weights_only=True)
    return found


def _of_layer(tensors: Tensors, layer: int) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if layer_of_np_key(key) == layer}


def test_the_files_are_document_000s(sequential_run: SequentialRun) -> None:
    info = json.loads((sequential_run.folder / "training_info.json").read_text())
    assert info["trained_layers"] == [0, 1, 3] and info["layer_in_progress"] is None
    assert list(info["layer_checkpoints"]) == ["0", "1", "3"]
    for layer, path in info["layer_checkpoints"].items():
        assert Path(path) == sequential_run.layer(int(layer)).parent
    names = {path.name for path in sequential_run.folder.iterdir() if not path.name.startswith("layer_")}
    files = ("accumulated_npt_weights.pt", "accumulated_npt_weights.safetensors", "load_model.py")
    assert names == {*files, "training_info.json", "config.json"}
    accumulated = _weights(sequential_run.folder / "accumulated_npt_weights.pt")
    finals = [_weights(sequential_run.layer(layer) / "final" / "npt_weights.pt") for layer in (0, 1, 3)]
    assert [{layer_of_np_key(key) for key in tensors} for tensors in finals] == [{0}, {1}, {3}]
    assert not differences(accumulated, finals[0] | finals[1] | finals[2])


def test_a_layer_is_trained_on_top_of_trained_layers_which_stay_as_they_are(
    sequential_run: SequentialRun,
) -> None:
    layers: list[int] = []
    for layer in (0, 1, 3):
        layers.append(layer)
        steps = [
            _weights(sequential_run.layer(layer) / f"checkpoint-{step}" / "npt_weights.pt")
            for step in (2, 4, 6)
        ]
        for tensors in steps:
            assert sorted({layer_of_np_key(key) for key in tensors}) == layers
            for earlier in layers[:-1]:
                final = _weights(sequential_run.layer(earlier) / "final" / "npt_weights.pt")
                assert not differences(_of_layer(tensors, earlier), final)
        for one, other in itertools.pairwise(steps):
            moved = differences(_of_layer(one, layer), _of_layer(other, layer))
            assert len(moved) == len(_of_layer(one, layer))


def _single(sequential_run: SequentialRun, layer: int, *more: str) -> Tensors:
    folder = sequential_run.root / f"single-{layer}{'-on-top' if more else ''}"
    flags = shlex.split(
        "--mode single_layer --np-rank 4 --train-iters 6 --stage1-steps 2 --lr 1e-2 --batch_size 2"
    )
    flags += [
        *DATA,
        "--global-batch-size",
        "4",
        "--base-checkpoint",
        sequential_run.base,
        "--data-path",
        sequential_run.data,
    ]
    run_single(train, *flags, "--npt-layers", str(layer), "--save", str(folder), *more)
    return _weights(folder / "final" / "npt_weights.pt")


def test_the_first_layer_is_what_the_single_layer_mode_makes_of_it(sequential_run: SequentialRun) -> None:
    final = _weights(sequential_run.layer(0) / "final" / "npt_weights.pt")
    assert not differences(_single(sequential_run, 0), final)


def test_a_single_layer_is_trained_on_top_of_weights_of_others_and_its_own_are_left_out(
    sequential_run: SequentialRun,
) -> None:
    weights = sequential_run.folder / "accumulated_npt_weights.pt"
    others = _weights(weights)
    found = _single(sequential_run, 1, "--load-npt-weights", str(weights))
    for layer in (0, 3):
        assert not differences(_of_layer(found, layer), _of_layer(others, layer))
    alone_on_base = _single(sequential_run, 1)
    own, other = _of_layer(found, 1), _of_layer(alone_on_base, 1)
    assert own.keys() == other.keys() == alone_on_base.keys()
    assert differences(own, other), "what is below counts"
    assert differences(own, _of_layer(others, 1)), "it starts anew"


def test_the_data_goes_on_from_layer_to_layer_and_the_schedule_begins_anew(
    sequential_run: SequentialRun,
) -> None:
    for place, layer in enumerate((0, 1, 3)):
        progress = [
            json.loads((sequential_run.layer(layer) / f"checkpoint-{step}" / "state.json").read_text())[
                "progress"
            ]
            for step in (2, 6)
        ]
        assert [p["iteration"] for p in progress] == [2, 6]
        assert [p["consumed_samples"] for p in progress] == [(6 * place + step) * 4 for step in (2, 6)]
    first_steps = [line for line in sequential_run.output.splitlines() if line.startswith("step 1/6")]
    assert len(first_steps) == 3 and all("lr 1.000e-02" in line for line in first_steps)
    assert all("attention_reconstruction_loss" in line for line in first_steps)


def test_two_tensor_parallel_processes_train_the_same_layers(sequential_run: SequentialRun) -> None:
    folder = sequential_run.root / "tp2"
    layout = ["--layers", "0,1", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    found = run_distributed(train, 2, *sequential_run.flags(folder), *layout)
    assert [code for code, _ in found] == [0, 0] and found[1][1] == ""
    whole, divided = (
        _weights(path / "accumulated_npt_weights.pt") for path in (sequential_run.folder, folder)
    )
    for key, tensor in divided.items():
        torch.testing.assert_close(tensor, whole[key], atol=1e-4, rtol=1e-3)
    assert {layer_of_np_key(key) for key in divided} == {0, 1}


def _load_model(folder: str) -> tuple[torch.Tensor, Tensors, str]:
    specification = importlib.util.spec_from_file_location("load_model", f"{folder}/load_model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.load_model()
    return model.logits(IDS), dict(model.model.state_dict()), model.generate("3 4", max_new_tokens=3)


def _load_checkpoint(path: str) -> tuple[torch.Tensor, Tensors]:
    model = NPTModel.from_pretrained(path)
    return model.logits(IDS), dict(model.model.state_dict())


def test_load_model_gives_the_model_of_the_last_layers_run(sequential_run: SequentialRun) -> None:
    logits, state, text = alone(_load_model, str(sequential_run.folder))
    expected, expected_state = alone(_load_checkpoint, str(sequential_run.layer(3)))
    base, _ = alone(_load_checkpoint, sequential_run.base)
    assert torch.equal(logits, expected) and not torch.equal(logits, base)
    plain = {name: t for name, t in expected_state.items() if isinstance(t, torch.Tensor)}
    assert not differences({name: state[name] for name in plain}, plain)
    assert len(text.split()) <= 3
    code = (sequential_run.folder / "load_model.py").read_text()
    assert "exec(" not in code and "rank" not in code


def test_a_finished_run_says_so_and_more_layers_go_on_top(sequential_run: SequentialRun) -> None:
    moved = sequential_run.root / "moved"
    shutil.copytree(sequential_run.folder, moved)
    before = _weights(sequential_run.folder / "accumulated_npt_weights.pt")
    again = run_single(train, *sequential_run.flags(moved))
    assert again == (0, f"training is already complete: layers 0, 1, 3 are trained in {moved}\n")
    # Their run is in the middle of the layers: what lies above it is trained already, and active.
    more = [*sequential_run.flags(moved), "--layers", "all", "--start-from-layer", "2"]
    code, output = run_single(train, *more)
    assert code == 0 and "layer 2 (1 of 1 to train), on top of trained layers: 0, 1, 3" in output
    after = _weights(moved / "accumulated_npt_weights.pt")
    assert {layer_of_np_key(key) for key in after} == {0, 1, 2, 3}
    assert not differences({key: after[key] for key in before}, before)


def _refused(*flags: str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        train(*flags)
    return str(error.value)


REFUSED = {
    "another rank": (["--np-rank", "8"], "were trained with another configuration: np_rank was 4, now 8"),
    "earlier layers": (
        ["--start-from-layer", "3", "--checkpoint-dir", "NEW"],
        "layers 0, 1 must be trained first",
    ),
    "no such start": (["--start-from-layer", "2"], "--start-from-layer 2: must be one of the layers 0, 1, 3"),
    "--train-iters": (
        ["--train-iters", "9"],
        "--train-iters 9: --mode sequential trains every layer for 6 steps",
    ),
    "stage 1": (["--stage1-steps", "6"], "--stage1-steps 6: must be less than --steps-per-layer 6"),
    "the base": (["--no-freeze-base"], "--no-freeze-base: not supported by --mode sequential"),
    "weights": (["--load-npt-weights", "PT"], "which reads trained layers from --checkpoint-dir"),
    "another base": (["--base-checkpoint", "OTHER"], "were trained on"),
    "a run": (["--load", "RUN"], "must be a base model in --mode sequential"),
}


def _all_refused(commands: dict[str, list[str]]) -> dict[str, str]:
    return {name: _refused(*flags) for name, flags in commands.items()}


def test_what_does_not_fit_is_one_line(sequential_run: SequentialRun) -> None:
    other = sequential_run.root / "other"
    other.mkdir()
    places = {
        "NEW": str(sequential_run.root / "new"),
        "RUN": str(sequential_run.layer(0)),
        "PT": str(sequential_run.folder / "accumulated_npt_weights.pt"),
        "OTHER": run_single(make_base, str(other), sequential_run.data, "--seed", "7"),
    }
    common = sequential_run.flags(sequential_run.folder)
    commands = {
        name: [*common, *(places.get(word, word) for word in flags)] for name, (flags, _) in REFUSED.items()
    }
    for name, message in run_single(_all_refused, commands).items():
        assert REFUSED[name][1] in message and "\n" not in message, name
    assert not Path(places["NEW"]).exists() or not list(Path(places["NEW"]).iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": "another"}, "was not written by a sequential run"),
        ({"layer_checkpoints": {}}, "damaged"),
        ({"trained_layers": [0, 1, 2]}, "layer 2 are missing"),
    ],
)
def test_damaged_files_are_named(
    sequential_run: SequentialRun, tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    info = json.loads((sequential_run.folder / "training_info.json").read_text())
    info["layer_checkpoints"]["2"] = "layer_2"
    (tmp_path / "training_info.json").write_text(json.dumps(info | damage))
    name = "accumulated_npt_weights.safetensors"
    tensors = sequential_run.folder / name
    (tmp_path / name).write_bytes(tensors.read_bytes())
    with pytest.raises(ValueError, match=message):
        _read_all(tmp_path)


def _read_all(folder: Path) -> None:
    from megatron_ext.npt.runs.sequential_files import read_accumulated, read_state

    state = read_state(folder)
    assert state is not None
    read_accumulated(folder, state)


def test_the_modes_defaults_are_document_000s() -> None:
    defaults = mode_defaults({"mode": "sequential"}).sections
    assert defaults["np"] == {"np_form": "outer_product", "np_rank": 256}
    assert defaults["training"] == {"micro_batch_size": 2, "train_iters": 2000}
    assert defaults["optimizer"] == {"lr": 5e-4}
    name = r"experiments/sequential_checkpoint_\d{8}_\d{6}"
    assert re.fullmatch(name, defaults["checkpoint"]["save"])


def test_every_layer_has_curves_and_a_run_name_of_its_own() -> None:
    logging = LoggingConfig(tensorboard_dir="logs", wandb_project="npt-sequential", wandb_tags=("mine",))
    changed = layer_logging(logging, "layer_2_20250910_180000", 2, "1b")
    assert changed.tensorboard_dir == "logs/layer_2_20250910_180000"
    assert changed.wandb_exp_name == "layer_2_1b_20250910_180000"
    assert changed.wandb_tags == ("mine", "sequential", "layer_2")
