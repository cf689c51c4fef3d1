"""LoRA adapters over frozen models of every kind, at every layout: losses, gradients and what is saved."""

import math
from dataclasses import replace

import pytest

from megatron_ext.adapters.adapter_family import ADAPTER, AdapterFamily
from megatron_ext.lora.adapter_config import AdapterConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.logging.family_costs import run_cost
from tests.distributed.families import test_gemma3n_pieces_at_layouts as gemma3n
from tests.distributed.families import test_gemma_pieces_at_layouts as gemma4

SETTINGS = AdapterConfig(lora_rank=4, lora_alpha=8)
PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_strategy="identity", per_layer_hidden_size=8)
NPT = NPTModuleConfig(npt_layers="1,3", np_form="low_rank", np_rank=4, np_init_scale=0.5)
GEMMA = replace(
    TINY,
    swiglu=False,
    geglu=True,
    sandwich_norm=True,
    qk_layernorm=True,
    apply_layernorm_1p=True,
    window_size="4,0",
    window_attn_skip_freq="2",
    init_method_std=0.1,
)
MODEL = replace(TINY, init_method_std=0.1)
MODELS = {  # the last layers of Gemma 4 and 3n have queries only, over the keys of earlier layers
    "plain": MODEL,
    "gemma": GEMMA,
    "Gemma 4": gemma4.GEMMA4,
    "Gemma 3n": gemma3n.GEMMA3N,
    "PLE": MODEL,
    "new PLE": MODEL,
    "NPT": MODEL,
}


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        others: list[Family] = []
        if "PLE" in self.variant:
            others = [PerLayerFamily(PLE, VOCAB_SIZE)]
        if self.variant == "NPT":
            others = [NPTFamily(NPT)]
        if self.variant.startswith("Gemma"):
            others = gemma4.per_layer() if self.variant == "Gemma 4" else gemma3n.per_layer()
        return [*others, AdapterFamily(SETTINGS, others if self.variant == "new PLE" else ())]


RUNS = LayoutRuns(
    {name: Variant(make_families=_Make(name), model=model, steps=3) for name, model in MODELS.items()},
    ["TP2+SP", "PP2 interleaved"],
    {
        "TP2": ["plain"],
        "CP2": ["gemma"],
        "TP1 recomputed": ["plain", "new PLE"],
        "PP2 interleaved recomputed": ["PLE", "Gemma 4"],
        "DP2 distributed optimizer": ["new PLE"],
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_trains_and_saves_as_the_single_process_does(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant))


@pytest.mark.parametrize("variant", MODELS)
def test_adapters_train_and_what_was_loaded_does_not(variant: str) -> None:
    run = RUNS.single(variant)
    trained = set(assemble([run.trace]))
    adapters = {key for key, _ in run.saved if f".adapters.{ADAPTER}." in key}
    assert len(adapters) == 4 * 4 * 2
    new = {key for key, _ in run.saved if "per_layer" in key or ".before_layer." in key}
    assert trained == adapters | (new if variant == "new PLE" else set())


@pytest.mark.parametrize("variant", ["plain", "gemma", "Gemma 4", "Gemma 3n"])
def test_the_cost_counts_every_parameter_of_the_adapters(variant: str) -> None:
    found = sum(math.prod(shape) for key, shape in RUNS.single(variant).saved if ".adapters." in key)
    cost = run_cost(MODELS[variant], VOCAB_SIZE, 1, _Make(variant)(), 1)
    assert cost.parts["lora"].parameters == cost.parts["lora"].trained_parameters == found
    assert cost.parts["base"].trained_parameters == 0
