"""`--np-init-strategy calibrated` for low_rank and outer_product: their start, layouts, and training from it."""

import json
import unittest.mock
from pathlib import Path

import pytest
import torch

from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.calibration_runs import LAYOUTS, Prepared, killed_calibration
from tests.integration.npt.npt_run_helpers import DATA, MODEL, make_base, train

COMMON = [
    *("--np-init-strategy", "calibrated", "--calibration-tokens", "800", "--npt-layers", "1,3"),
    *("--np-rank", "24", "--mode", "multi_layer"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3", *DATA),
]
KEEP = ["--np-target", "gate+up", "--np-residual", "keep"]
DROP = ["--np-target", "gate+up+down", "--np-residual", "drop"]
FORMS = {
    "low_rank": ["--np-form", "low_rank"],
    "low_rank k 2": ["--np-form", "low_rank", "--num-np-components", "2", "--np-rank", "12"],
    "outer_product": ["--np-form", "outer_product", "--no-np-normalize"],
    "outer_product k 2": ["--np-form", "outer_product", "--num-np-components", "2", "--np-rank", "12"],
    "outer_product normalized": ["--np-form", "outer_product", "--np-scale", "2"],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared.make(tmp_path_factory.mktemp("forms"), COMMON)


def _divergences(base: str, *files: str) -> list[float]:
    """KL(base || NPT) of the weights in each file, on the same tokens."""
    tokens = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(5)).tolist()
    logits = []
    for file in (None, *files):
        model = NPTModel.from_pretrained(base)
        if file is not None:
            model.load_npt_weights(file)
        logits.append(torch.stack([model.logits(row).float().log_softmax(-1) for row in tokens]))
    expected = logits[0]
    return [float((expected.exp() * (expected - found)).sum(-1).mean()) for found in logits[1:]]


def _weights(prepared: Prepared, name: str, folder: str = "calibrated") -> str:
    return str(prepared.root / name / folder / "npt_weights.pt")


@pytest.fixture(scope="module")
def untrained(prepared: Prepared) -> dict[str, float]:
    """KL(base || NPT) of random factors, by residual."""
    random = ["--np-form", "low_rank", "--np-init-strategy", "improved", "--train-iters", "1", "--lr", "1e-9"]
    names = {"keep": KEEP, "drop": DROP}
    for name, target in names.items():
        run_single(train, *prepared.flags(f"random-{name}", *target, *random))
    files = [_weights(prepared, f"random-{name}", "final") for name in names]
    return dict(zip(names, run_single(_divergences, prepared.base, *files), strict=True))


@pytest.mark.parametrize("target", [KEEP, DROP], ids=["keep", "drop"])
@pytest.mark.parametrize("form", FORMS)
def test_a_calibrated_form_starts_nearer_to_the_base_than_random_factors(
    form: str, target: list[str], prepared: Prepared, untrained: dict[str, float]
) -> None:
    name, residual = f"{form}-{target[-1]}", target[-1]
    code, output = run_single(train, *prepared.flags(name, *FORMS[form], *target, "--train-iters", "0"))
    assert code == 0 and f"written: {prepared.root / name}/calibrated" in output
    (found,) = run_single(_divergences, prepared.base, _weights(prepared, name))
    # On this random base the term that no form can write, (rho - 1) n, is large.
    assert found < {"keep": 0.7, "drop": 0.5}[residual] * untrained[residual], (found, untrained)
    report = json.loads((prepared.root / name / "calibrated/spectrum.json").read_text())
    for of_layer in report["layers"].values():
        assert set(of_layer) == {"gate", "up", "down"} - ({"down"} if residual == "keep" else set())
        assert of_layer["gate"]["error_left"] == of_layer["up"]["error_left"] < 0.6
        assert residual == "keep" or of_layer["down"]["error_left"] < 0.3
        printed = f": gate+up rank {of_layer['gate']['rank']}, {of_layer['gate']['error_left']:.2%} left"
        assert printed in output
    assert "as a fraction of the square of the values that the deltas should add" in output


def _plain_base(folder: str, data: str) -> str:
    """A base model with LayerNorm and biases, whose MLP has no gate."""
    plain = [flag for flag in MODEL if flag not in ("--swiglu", "--disable-bias-linear")]
    with unittest.mock.patch("tests.integration.npt.npt_run_helpers.MODEL", plain):
        return make_base(folder, data, "--normalization", "LayerNorm")


@pytest.mark.parametrize("form", ["low_rank", "outer_product", "outer_product normalized"])
def test_a_model_with_layer_norm_biases_and_no_gate_is_calibrated(
    form: str, prepared: Prepared, tmp_path: Path
) -> None:
    base = run_single(_plain_base, str(tmp_path), prepared.data)
    flags = [
        *prepared.flags("plain", *FORMS[form]),
        "--np-target",
        "fc1",
        "--np-residual",
        "keep",
        "--load",
        base,
    ]
    files = []
    for name, more in (
        ("random", ["--np-init-strategy", "improved", "--train-iters", "1", "--lr", "1e-9"]),
        ("calibrated", ["--train-iters", "0"]),
    ):
        run_single(train, *flags, "--save", str(tmp_path / name), *more)
        files.append(str(tmp_path / name / {"random": "final"}.get(name, name) / "npt_weights.pt"))
    random, calibrated = run_single(_divergences, base, *files)
    assert calibrated < 0.7 * random, (calibrated, random)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["low_rank", "outer_product normalized"])
def test_every_layout_gives_the_factors_of_one_process(layout: str, form: str, prepared: Prepared) -> None:
    flags, single = [*FORMS[form], *DROP, "--train-iters", "0"], f"one {form}"
    if not (prepared.root / single).exists():
        run_single(train, *prepared.flags(single, *flags))
    name = f"{layout} {form}"
    run_distributed(train, 2, *prepared.flags(name, *flags, *LAYOUTS[layout]))
    (ours, settings), (one, expected) = (
        run_single(read_np_weight_file, _weights(prepared, folder)) for folder in (name, single)
    )
    assert settings == expected and ours.keys() == one.keys()
    for key, value in one.items():
        difference = (ours[key] - value).norm() / value.norm().clamp_min(1e-6)
        assert float(difference) < 2e-3, (key, float(difference))


def test_a_killed_calibration_leaves_nothing_and_the_repeated_command_trains_from_its_result(
    prepared: Prepared,
) -> None:
    flags = prepared.flags("killed", *FORMS["low_rank"], *KEEP, "--train-iters", "2")
    folder = prepared.root / "killed"
    run_single(killed_calibration, *flags)
    assert not (folder / "calibrated").exists()
    code, output = run_single(train, *flags)
    assert code == 0 and "calibrating on 800 tokens" in output and "NP weights: calibrated, " in output
    assert (folder / "final/npt_weights.pt").is_file() and not list(folder.glob(".writing*"))


def test_without_down_the_lost_attention_output_is_not_fitted_and_keep_leaves_down_at_zero(
    prepared: Prepared,
) -> None:
    run_single(
        train,
        *prepared.flags("only gate", "--np-target", "gate", "--np-residual", "drop", "--train-iters", "0"),
    )
    weights, _ = run_single(read_np_weight_file, _weights(prepared, "only gate"))
    assert {key.split(".")[1] for key in weights} == {"gate"}
    both = [
        "--np-target",
        "gate+up+down",
        "--np-residual",
        "keep",
        "--np-form",
        "low_rank",
        "--train-iters",
        "0",
    ]
    run_single(train, *prepared.flags("keep down", *both))
    weights, _ = run_single(read_np_weight_file, _weights(prepared, "keep down"))
    assert not weights["layer_1_np.down.B"].any() and weights["layer_1_np.down.A_in"].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--np-form", "low_rank", "--np-rank", "33"],
            "--np-rank 33: for a calibrated start, the rank must be at most the hidden size 32",
        ),
        (
            ["--np-form", "low_rank", "--np-rank", "20", "--num-np-components", "2"],
            "--np-rank 20: for a calibrated start, rank times components, 20 x 2, must be at most the hidden size 32",
        ),
        (
            [
                "--np-form",
                "outer_product",
                "--mode",
                "single_layer",
                "--npt-layers",
                "3",
                "--stage1-steps",
                "5",
            ],
            "--stage1-steps 5: stage 1, which trains v_a to equal the attention output, would undo "
            "--np-init-strategy calibrated; pass --stage1-steps 0",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(more: list[str], message: str, prepared: Prepared) -> None:
    with pytest.raises(ValueError, match=message):
        run_single(train, *prepared.flags("refused", *KEEP, "--train-iters", "0", *more))
