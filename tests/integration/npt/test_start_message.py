"""What a run tells before its first step, and what it takes from the file of --load-npt-weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.npt.runs.npt_run import weights_defaults
from megatron_ext.npt.runs.start_message import objective
from megatron_ext.npt.weights.np_weight_files import write_np_weights
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.conftest import SequentialRun
from tests.integration.npt.npt_run_helpers import DATA, train

SETTINGS = NPTModuleConfig(
    npt_layers="1,3",
    np_form="outer_product",
    np_target="gate+up",
    np_rank=4,
    np_affine=False,
    freeze_base=False,
)


def _start(flags: list[str], wrong: list[str]) -> tuple[str, str]:
    """What a run prints that is given no form, rank or layers, and how contradicting flags are refused."""
    output = train(*flags)[1]
    with pytest.raises(ValueError, match="another configuration") as refused:
        train(*flags, *wrong)
    return output, str(refused.value)


def test_a_run_tells_its_base_conversion_weights_and_losses_and_takes_the_weights_settings(
    sequential_run: SequentialRun,
) -> None:
    weights = str(sequential_run.folder / "accumulated_npt_weights.pt")
    flags = ["--mode", "multi_layer", "--load", sequential_run.base, "--load-npt-weights", weights]
    flags += ["--data-path", sequential_run.data, "--train-iters", "1", "--lr", "1e-2", *DATA]
    output, refused = run_single(_start, flags, ["--np-rank", "8", "--np-form", "low_rank"])
    # h = 32, f = 64: a layer has 3 h^2 + h^2 + 3 h f + 2 h, its NP component r (2 h + f) + h.
    own, ours = 3 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32), 3 * (4 * (2 * 32 + 64) + 32)
    assert output.splitlines()[:3] == [
        f"NPT on {Path(sequential_run.base).resolve()}/iter_0000001: layers 0,1,3 of 4, outer_product on gate, rank 4, "
        "k 1, affine on, residual drop",
        f"NP weights: from {weights}; {ours:,} parameters are trained, {ours / own:.1%} of the {own:,} in their layers",
        "npt loss = mean over layers of (1 mlp_direct_loss) + 1 fidelity_loss (kl); "
        "curriculum teacher:1:0:0,mixed:1:0.5:0.5,student:1:1:1",
    ]
    assert "np_form was outer_product, now low_rank; np_rank was 4, now 8" in refused


def test_a_layer_by_layer_run_tells_what_each_layer_stands_on(sequential_run: SequentialRun) -> None:
    told = [line for line in sequential_run.output.splitlines() if line.startswith("NP weights: ")]
    fresh = "initialized (improved, scale 0.01, seed 1234) in layer"
    assert [line.partition(";")[0].removeprefix("NP weights: ") for line in told] == [
        f"{fresh} 0",
        f"as trained before in layer 0, {fresh} 1",
        f"as trained before in layers 0, 1, {fresh} 3",
    ]


def test_losses_without_weight_are_not_told() -> None:
    assert objective(NPTTrainingConfig(mode="lm"), 9) == "npt loss = 1 lm loss; no curriculum"
    cosine = NPTTrainingConfig(
        equivalence_loss="cosine",
        layer_losses="document",
        regularization_weight=0,
        layer_weights="linear",
    )
    assert objective(cosine, 9) == (
        "npt loss = sum over layers, weighted linear, of (1 equivalence_loss (cosine)); no curriculum"
    )
    single = objective(NPTTrainingConfig(mode="single_layer"), 600)
    assert single.startswith(
        "npt loss = attention_reconstruction_loss for the first 500 of 600 steps, then mean"
    )


@pytest.mark.parametrize("name", ["npt_weights.pt", "npt_weights.safetensors"])
def test_the_files_settings_are_defaults_but_for_what_is_no_matter_of_the_weights(
    name: str, tmp_path: Path
) -> None:
    write_np_weights(tmp_path, {"layer_1_np.gate.c": torch.ones(1)}, SETTINGS)
    given = {"load_npt_weights": str(tmp_path / name)}
    section = weights_defaults(given).sections["np"]
    assert NPTModuleConfig(**section) == replace(SETTINGS, freeze_base=True)
    alone = weights_defaults(given | {"mode": "single_layer"}).sections["np"]
    assert section.keys() - alone.keys() == {"npt_layers"}
    # so that the error which follows is about the form, not about a flag that was not given
    other = weights_defaults(given | {"np_form": "low_rank"}).sections["np"]
    assert section.keys() - other.keys() == {"np_affine", "np_normalize"}
