"""`pretrain_npt.py --np-init-strategy calibrated`: the files, the ranks, training from them, resuming, the layouts."""

import json
import signal
import unittest.mock

import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.models.costs.model_cost import layer_parameters
from megatron_ext.npt.npt_cost import np_parameters
from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file
from megatron_ext.registry.loaded_path import check_holds_checkpoint
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from tests.integration.npt.calibration_runs import LAYOUTS, Prepared, killed_calibration
from tests.integration.npt.npt_run_helpers import DATA, train

HIDDEN = 32
FORM = [
    *("--np-form", "key_value", "--np-init-strategy", "calibrated", "--calibration-tokens", "200"),
    *("--npt-layers", "1,3", "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3", *DATA),
]
DROP = ["--np-target", "gate+up+down", "--np-residual", "drop"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared.make(tmp_path_factory.mktemp("calibrated"), FORM)


def _losses(base: str, weights: str) -> tuple[float, float]:
    """Of the base model and of the converted one, on the same tokens."""
    tokens = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    model = NPTModel.from_pretrained(base)
    before = model.loss(tokens)
    model.load_npt_weights(weights)
    return before, model.loss(tokens)


@pytest.mark.parametrize("metric", ["fisher", "output"])
@pytest.mark.parametrize(
    "target", [["--np-target", "gate+up", "--np-residual", "keep"], DROP], ids=["keep", "drop"]
)
def test_at_full_rank_the_calibrated_model_is_the_base_model(
    target: list[str], metric: str, prepared: Prepared
) -> None:
    name = f"full-{metric}-{target[-1]}"
    rank = ["--np-rank", str(HIDDEN), "--calibration-metric", metric]
    code, output = run_single(train, *prepared.flags(name, *target, *rank, "--train-iters", "0"))
    folder = prepared.root / name
    assert code == 0 and "calibrating on 208 tokens" in output and f"written: {folder}/calibrated" in output
    assert f"--npt-weights {folder}/calibrated/npt_weights.safetensors --data-path" in output
    assert f"gate+up rank {HIDDEN}, 0.00% left" in output
    assert ("predicted KL of a layer without deltas" in output) == (metric == "fisher")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["calibrated"]
    base, converted = run_single(_losses, prepared.base, str(folder / "calibrated/npt_weights.safetensors"))
    assert converted == pytest.approx(base, abs=2e-5)


def test_a_budget_becomes_numbers_which_are_trained_from_stored_and_resumed(prepared: Prepared) -> None:
    flags = prepared.flags("auto", *DROP, "--np-rank", "auto:0.2", "--save-interval", "2")
    code, output = run_single(train, *flags, "--train-iters", "2")
    folder = prepared.root / "auto"
    assert code == 0 and "NP weights: calibrated, " in output
    stored = read_run_config(str(folder))
    settings = stored["families"]["npt"]["settings"]
    weights, in_file = run_single(read_np_weight_file, str(folder / "calibrated/npt_weights.pt"))
    assert in_file.np_rank == settings["np_rank"] != "auto:0.2"
    model = group_in(ModelConfig, stored, "model")
    counted = sum(value.numel() for value in weights.values())
    assert counted == sum(np_parameters(in_file, model, layer) for layer in (1, 3))
    share = counted / (2 * layer_parameters(model))
    assert 0.19 < share <= 0.2
    spectrum = json.loads((folder / "calibrated/spectrum.json").read_text())
    assert spectrum["np_rank"] == in_file.np_rank and spectrum["tokens"] == 208
    for layer in ("1", "3"):
        of_layer = spectrum["layers"][layer]
        assert of_layer["fc1"]["rank"] == in_file.rank(int(layer), "fc1", 4)
        assert of_layer["down"]["rank"] == in_file.rank(int(layer), "down", 4)
        assert len(of_layer["fc1"]["squared_singular_values"]) == HIDDEN
    resumed = [*flags, "--load", str(folder), "--base-checkpoint", prepared.base, "--train-iters", "4"]
    code, output = run_single(train, *resumed)
    assert code == 0 and "calibrating on" not in output
    assert read_run_config(str(folder))["families"]["npt"]["settings"] == settings
    assert (folder / "checkpoint-4").is_dir()


def _refused(folder: str) -> str:
    with pytest.raises(FileNotFoundError) as error:
        check_holds_checkpoint("--load", folder)
    return str(error.value)


def test_a_directory_with_calibrated_weights_only_says_what_takes_them(prepared: Prepared) -> None:
    folder = prepared.root / "only"
    run_single(train, *prepared.flags("only", *DROP, "--np-rank", "4", "--train-iters", "0"))
    refused = run_single(_refused, str(folder))
    assert refused.startswith(f"--load {folder}: no checkpoint found; it contains only calibrated NP weights")
    assert f"--npt-weights {folder}/calibrated/npt_weights.safetensors" in refused
    assert run_single(_refused, f"{folder}/none") == f"--load {folder}/none: no such directory"


def _kl(base: str, weights: str) -> float:
    """KL(base || converted) per token, on random tokens as in the data of the calibration."""
    tokens = torch.randint(0, 64, (128, 16), generator=torch.Generator().manual_seed(5))
    model = NPTModel.from_pretrained(base)
    before = model.logits(tokens).log_softmax(-1)
    model.load_npt_weights(weights)
    after = model.logits(tokens).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_bound_on_the_predicted_kl_takes_the_fewest_ranks_that_keep_it(prepared: Prepared) -> None:
    bound, calibration = 1e-4, ["--calibration-tokens", "2000", "--train-iters", "0"]
    code, _ = run_single(train, *prepared.flags("kl", *DROP, "--np-rank", f"auto:kl={bound}", *calibration))
    folder = prepared.root / "kl/calibrated"
    assert code == 0
    spectrum = json.loads((folder / "spectrum.json").read_text())
    places = [place for of_layer in spectrum["layers"].values() for place in of_layer.values()]
    assert all(1 < place["rank"] < HIDDEN for place in places)
    left = sum(sum(place["squared_singular_values"][place["rank"] :]) for place in places) / 2
    last = min(place["squared_singular_values"][place["rank"] - 1] for place in places) / 2
    assert left <= bound < left + last
    measured = run_single(_kl, prepared.base, str(folder / "npt_weights.safetensors"))
    assert 0.5 < measured / left < 2


def test_a_killed_calibration_leaves_nothing_and_a_finished_one_is_kept(prepared: Prepared) -> None:
    target = ["--np-target", "gate+up", "--np-rank", "4"]
    flags = prepared.flags("killed", *target, "--train-iters", "0")
    folder = prepared.root / "killed"
    run_single(killed_calibration, *flags)
    assert not (folder / "calibrated").exists()
    _, first = run_single(train, *flags)
    before = (folder / "calibrated/npt_weights.pt").read_bytes()
    assert "calibrating on" in first and not list(folder.glob(".writing*"))
    _, second = run_single(train, *flags)
    assert "from an earlier start of this run" in second and "calibrating on" not in second
    _, other = run_single(train, *flags, "--calibration-tokens", "100")
    assert "calibrating on 112 tokens" in other
    _, again = run_single(train, *flags)
    assert "calibrating on" in again, "the directory now belongs to other settings"
    assert (folder / "calibrated/npt_weights.pt").read_bytes() == before, "the same command, the same bits"


def _terminated(*flags: str) -> object:
    def end(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with unittest.mock.patch("megatron_ext.npt.calibration.calibrated_start.collect_moments", end):
        try:
            return train(*flags)
        except SystemExit as ended:
            return ended.code


def test_a_terminated_calibration_leaves_neither_a_lock_nor_the_directory_that_it_made(
    prepared: Prepared,
) -> None:
    flags = prepared.flags("terminated", *DROP, "--np-rank", "4", "--train-iters", "0")
    assert run_single(_terminated, *flags) == 143
    assert not (prepared.root / "terminated").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_maps(layout: str, prepared: Prepared) -> None:
    flags = [*DROP, "--np-rank", "auto:0.2", "--train-iters", "0"]
    if not (prepared.root / "one").exists():
        run_single(train, *prepared.flags("one", *flags))
    run_distributed(train, 2, *prepared.flags(layout, *flags, *LAYOUTS[layout]))
    (ours, settings), (one, expected) = (
        run_single(read_np_weight_file, str(prepared.root / name / "calibrated/npt_weights.pt"))
        for name in (layout, "one")
    )
    assert settings == expected
    for layer in (1, 3):
        for target in ("fc1", "down"):
            a, b = (
                tensors[f"layer_{layer}_np.{target}.A"] @ tensors[f"layer_{layer}_np.{target}.B"]
                for tensors in (ours, one)
            )
            assert float((a - b).norm() / b.norm()) < 1e-3, (layer, target)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--np-rank", "33"],
            "--np-rank 33: for a calibrated start, the rank must be at most the hidden size 32",
        ),
        (["--np-rank", "auto:0.0001"], "the budget is .* parameters, but rank 1 everywhere needs"),
        (
            ["--np-rank", "auto:kl=0.1", "--calibration-metric", "output"],
            "requires --calibration-metric fisher",
        ),
        (
            ["--np-rank", "4", "--mode", "sequential"],
            "a calibration computes the factors of all layers together; choose another --mode",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(more: list[str], message: str, prepared: Prepared) -> None:
    flags = [*prepared.flags("refused", *DROP, "--train-iters", "0", "--stage1-steps", "0"), *more]
    with pytest.raises(ValueError, match=message):
        run_single(train, *flags)


def test_a_run_of_no_steps_needs_a_calibration(prepared: Prepared) -> None:
    flags = [*prepared.flags("none", *DROP, "--train-iters", "0"), "--np-init-strategy", "improved"]
    with pytest.raises(ValueError, match="--train-iters 0: must be at least 1"):
        run_single(train, *flags)
