"""The families in one model: per-layer embedding, NPT layers and a grown stack, at every parallel layout, saved and
resumed.
"""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from megatron_ext.config.command_line.parse import parse
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform import process_groups
from megatron_ext.progressive.runs.progressive_run import run_progressive
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.pretrain import MakeFamilies
from tests.integration.progressive.progressive_run_helpers import FLAGS, losses_of, stored, write_data

GROWTH = (
    "--target-stacks",
    "2",
    "--stack-steps",
    "2",
    "--no-cache-activations",
    "--building-mode",
    "prepend",
)
LAYOUTS = {
    "TP1": (),
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "CP2": ("--context-parallel-size", "2"),
}
Result = tuple[list[float], dict[str, torch.Tensor]]


def others(config: ProgressiveRunConfig, tokenizer: Tokenizer) -> list[Family]:
    """PLE in all layers, NP components in every second one."""
    per_layer = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_hidden_size=8, per_layer_strategy="identity"
    )
    layers = ",".join(map(str, range(1, config.model.num_layers, 2)))
    plastic = NPTModuleConfig(npt_layers=layers, np_rank=4, freeze_base=False)
    return [PerLayerFamily(per_layer, tokenizer.vocab_size), NPTFamily(plastic)]


def train(
    data: str, save: str, *flags: str, make_others: MakeFamilies[ProgressiveRunConfig] = others
) -> list[float]:
    process_groups.shutdown = lambda: None
    arguments = [*FLAGS, "--data-path", data, "--save", save, *GROWTH, *flags]
    config = parse(ProgressiveRunConfig, arguments, find=lambda given: [stack_defaults(given)])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run_progressive(config, make_others) == 0
    return losses_of(output.getvalue())


def at_layouts(data: str, folder: str, layouts: list[str]) -> dict[str, Result]:
    found = {}
    for layout in layouts:
        losses = train(data, f"{folder}/{layout}", *LAYOUTS[layout])
        for stop in (("--exit-interval", "3"), ()) if layout != "TP1" else ():
            train(data, f"{folder}/{layout} resumed", *LAYOUTS[layout], *stop)
        found[layout] = losses, stored(f"{folder}/{layout}", "progressive_rack")
        if layout != "TP1":
            found[f"{layout} resumed"] = losses, stored(f"{folder}/{layout} resumed", "progressive_rack")
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("composition")
    data = write_data(Path(folder))
    single: dict[str, Result] = run_single(at_layouts, data, str(folder), ["TP1"])
    return single | run_distributed(at_layouts, 2, data, str(folder), list(LAYOUTS)[1:])[0]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_three_families_train_in_one_grown_model_as_in_a_single_process(
    results: dict[str, Result], layout: str
) -> None:
    assert len(results[layout][0]) == 4
    assert results[layout][0] == pytest.approx(results["TP1"][0], rel=2e-4)
    names = results["TP1"][1]
    for part in (
        "per_layer.layers.3.",
        "decoder.layers.3.feed_forward.",
        "decoder.layers.3.mlp.linear_fc1.adapters",
    ):
        assert any(name.startswith(part) for name in names), part


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_their_resumed_training_ends_with_the_same_bits(results: dict[str, Result], layout: str) -> None:
    whole, resumed = results[layout][1], results[f"{layout} resumed"][1]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
