"""Adapted linear layers against their formula in float64, the engine's own layers, and themselves merged."""

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.lora.adapter import LoRAAdapter
from megatron_ext.lora.parallel_linear import LayerSettings
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.base_parameters import base_tensor_ids
from megatron_ext.models.build_model import build_model
from megatron_ext.models.model_extension import Extension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import VOCAB_SIZE
from tests.unit.progressive.progressive_helpers import (
    DUAL,
    MODEL,
    AdaptedExtension,
    build,
    logits_of,
)

ADAPTED = dict.fromkeys(range(4), DUAL)


def _against_the_formula() -> list[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _, name, linear in adapted_linears(build(ADAPTED)):
        x = torch.randn(5, 2, linear.weight.size(1), generator=generator, requires_grad=True)
        weight = torch.randn(5, 2, linear.weight.size(0), generator=generator)
        (linear(x)[0] * weight).sum().backward()
        exact_x = x.detach().double().requires_grad_()
        leaves = {n: p.detach().double().requires_grad_() for n, p in linear.adapters.named_parameters()}
        exact = exact_x @ linear.weight.detach().double().t()
        for adapter, shape in DUAL.adapters.items():
            scale = shape.alpha / shape.rank
            exact = exact + scale * (exact_x @ leaves[f"{adapter}.A"].t() @ leaves[f"{adapter}.B"].t())
        (exact * weight.double()).sum().backward()
        pairs = [(linear(x)[0], exact), (x.grad, exact_x.grad)]
        pairs += [(p.grad, leaves[n].grad) for n, p in linear.adapters.named_parameters()]
        for ours, theirs in pairs:
            assert ours is not None and theirs is not None
            found.append((name, float(((ours.double() - theirs).norm() / theirs.norm()).detach())))
    return found


def test_output_and_gradients_equal_the_formula_in_float64() -> None:
    errors = run_single(_against_the_formula)
    assert len(errors) == 16 * 6
    assert max(error for _, error in errors) < 1e-6


def _initial() -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]], dict[str, int]]:
    plain = logits_of(build({})[0])
    chunks = build(ADAPTED, b_std=0.0)
    linears = list(adapted_linears(chunks))
    adapters = [
        adapter
        for _, _, linear in linears
        for adapter in linear.adapters.values()
        if isinstance(adapter, LoRAAdapter)
    ]
    of_base = base_tensor_ids(chunks)
    counts = {
        "base": sum(id(linear.weight) in of_base for _, _, linear in linears),
        "adapters": sum(id(p) in of_base for adapter in adapters for p in adapter.parameters()),
    }
    factors = [{name: factor.detach() for name, factor in a.named_parameters()} for a in adapters]
    return plain, logits_of(chunks[0]), factors, counts


def test_new_adapters_change_nothing_and_a_is_kaiming_uniform_over_the_whole_input() -> None:
    plain, adapted, adapters, counts = run_single(_initial)
    assert torch.equal(plain, adapted)
    assert counts == {"base": 16, "adapters": 0}
    reference = torch.nn.Linear(MODEL.hidden_size, 1000)  # torch draws its weight as peft draws A
    for adapter in adapters:
        bound = adapter["A"].size(1) ** -0.5
        assert float(adapter["B"].abs().max()) == 0.0
        assert bound * 0.8 < float(adapter["A"].abs().max()) <= bound
    every_a = torch.cat([a["A"].flatten() for a in adapters if a["A"].size(1) == MODEL.hidden_size])
    assert float(every_a.std()) == pytest.approx(float(reference.weight.detach().std()), rel=0.05)


def _two_families() -> str:
    initialize(ParallelConfig(), seed=1)
    extensions: list[Extension] = [AdaptedExtension(ADAPTED), AdaptedExtension(ADAPTED)]
    with pytest.raises(ValueError, match="layer 0") as error:
        build_model(MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    return str(error.value)


def test_two_families_cannot_bring_the_same_linear_layer() -> None:
    message = run_single(_two_families)
    assert (
        message == "layer 0: the model family 'adapted' uses the linear layer 'linear_qkv', which "
        "another model family already uses; apply the two families to different layers"
    )


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"trained_adapters \['other'\]: the layer has only the adapters \[\]"
    ):
        LayerSettings(trained_adapters=frozenset({"other"}))
    with pytest.raises(ValueError, match="precision qlora: four-bit weights cannot be trained"):
        LayerSettings(precision="qlora")
