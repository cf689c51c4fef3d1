"""NPT at every parallel layout: losses, gradient norms, first gradients, checkpoint keys, adapters; with PLE too."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_factors import gather_np_factors, load_np_factors
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family

MODEL = replace(TINY, init_method_std=0.1)
OUTER = NPTModuleConfig(
    npt_layers="all",
    np_form="outer_product",
    np_target="gate+up+down",
    np_rank=8,
    num_np_components=2,
    np_residual="keep",
    np_init_scale=0.05,  # much larger, and rounding errors grow a thousandfold over four layers
)
LOW_RANK = replace(OUTER, np_form="low_rank", num_np_components=1, np_residual="drop", np_init_scale=0.5)
KEY_VALUE = replace(LOW_RANK, np_form="key_value", np_scale=0.8)
UPPER = replace(LOW_RANK, npt_layers="upper_half", np_target="gate", freeze_base=False)
PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=24, per_layer_hidden_size=8)


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        settings = {
            "outer": OUTER,
            "low_rank": LOW_RANK,
            "key_value": KEY_VALUE,
            "upper half, base trains": UPPER,
            "frozen stage": None,
        }
        if self.variant == "with PLE":
            table = [token % 24 for token in range(VOCAB_SIZE)]
            return [PerLayerFamily(PLE, VOCAB_SIZE, table), NPTFamily(replace(OUTER, npt_layers="1,3"))]
        return [NPTFamily(settings[self.variant] or replace(LOW_RANK, npt_layers="upper_half"))]


VARIANTS = ("outer", "low_rank", "key_value", "upper half, base trains", "frozen stage", "with PLE")
"""`frozen stage`: with two stages the first one has nothing to train."""


def _round_trip(chunks: list[GPTModel]) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    """Shape and values of the adapter's factors, which survive a round trip."""
    adapter = gather_np_factors(chunks)
    load_np_factors(chunks, {key: 2 * tensor for key, tensor in adapter.items()})
    for key, tensor in gather_np_factors(chunks).items():
        assert torch.equal(tensor, 2 * adapter[key]), key
    load_np_factors(chunks, adapter)
    return {key: (tuple(tensor.shape), tensor.flatten().tolist()) for key, tensor in adapter.items()}


RECOMPUTED = ["TP1 recomputed", "TP2+SP recomputed", "PP2 interleaved recomputed", "TP2+SP MLP recomputed"]
RUNS = LayoutRuns(
    {
        # Where the base trains, some gradients are all rounding, which Adam follows: the same sums in all layouts.
        name: Variant(
            make_families=_Make(name),
            model=MODEL,
            examine=_round_trip,
            micro_batch_size=1 if "base trains" in name else None,
        )
        for name in VARIANTS
    },
    [*LAYOUTS, *RECOMPUTED, "CP2", "CP2 MLP recomputed"],
    {layout: ["outer", "key_value", "with PLE"] for layout in ("TP2+SPxCP2", "PP2xCP2", "DP2xCP2")},
)
BF16 = LayoutRuns(
    {name: Variant(make_families=_Make(name), model=MODEL, precision="bf16") for name in VARIANTS},
    ["TP2+SP"],
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_trains_and_saves_as_the_single_process_does(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant))


def _is_np(key: str) -> bool:
    return ".feed_forward." in key


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_np_parameters_get_gradients_and_of_the_base_only_what_trains(variant: str) -> None:
    gradients = assemble([RUNS.single(variant).trace])
    saved = {key for key, _ in RUNS.single(variant).saved}
    trained: Callable[[str], bool] = {
        "upper half, base trains": lambda key: True,
        "with PLE": lambda key: _is_np(key) or ".before_layer." in key or key.startswith("per_layer."),
    }.get(variant, _is_np)
    assert gradients.keys() == {key for key in saved if trained(key)}
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


H, F = MODEL.hidden_size, MODEL.resolved_ffn_hidden_size
ADAPTERS: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, tuple[int, ...]]]] = {
    "outer": (
        (0, 1, 2, 3),
        (".0", ".1"),
        {
            **{f"{target}.W_down": (H, 8) for target in ("gate", "up", "down")},
            **{f"{target}.W_a_up": (8, H) for target in ("gate", "up")},
            **{f"{target}.c_a": (H,) for target in ("gate", "up")},
            **{f"{target}.W_b_up": (8, F) for target in ("gate", "up")},
            "down.W_a_up": (8, F),
            "down.c_a": (F,),
            "down.W_b_up": (8, H),
        },
    ),
    "low_rank": (
        (0, 1, 2, 3),
        ("",),
        {
            **{f"{target}.A": (H, 8) for target in ("gate", "up", "down")},
            **{f"{target}.B": (8, F) for target in ("gate", "up")},
            "down.A_in": (F, 8),
            "down.B": (8, H),
        },
    ),
    "key_value": (
        (0, 1, 2, 3),
        ("",),
        {
            **{f"{target}.A": (H, 8) for target in ("fc1", "down")},
            **{f"{target}.B": (8, H) for target in ("fc1", "down")},
        },
    ),
    "upper half, base trains": ((2, 3), ("",), {"gate.A": (H, 8), "gate.B": (8, F)}),
}
"""Layers, suffixes of components, and the shape of each factor."""


@pytest.mark.parametrize("variant", ADAPTERS)
def test_adapters_are_named_by_layer_target_factor_and_component(variant: str) -> None:
    layers, components, shapes = ADAPTERS[variant]
    found = {key: shape for key, (shape, _) in RUNS.single(variant).examined.items()}
    assert found == {
        f"layer_{layer}_np.{name}{component}": shape
        for layer in layers
        for component in components
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("layout", "variant"), BF16.cases())
def test_bf16_follows_fp32(layout: str, variant: str) -> None:
    rounded, exact = BF16.at(layout, variant)[0], RUNS.single(variant)
    assert rounded.trace.losses == pytest.approx(exact.trace.losses, rel=2e-2)
