"""NPT's part in a run: frozen base, optimizer, cost, layers turned off, checkpoints, and the way through JSON."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_factors import gather_np_factors, load_np_factors
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family

SINGLE = ParallelConfig()
OUTER = NPTModuleConfig(np_form="outer_product", np_rank=4, num_np_components=2, np_target="gate+up+down")
LOW_RANK = NPTModuleConfig(np_rank=4, np_target="gate+up+down", npt_layers="0,3")
SETTINGS = {
    "low_rank gate": NPTModuleConfig(np_rank=4),
    "low_rank triple": LOW_RANK,
    "key_value dual": NPTModuleConfig(np_form="key_value", np_rank=4, np_target="gate+up"),
    "key_value triple": replace(LOW_RANK, np_form="key_value"),
    "key_value fc1": NPTModuleConfig(np_form="key_value", np_rank=4, np_target="fc1"),
    "outer gate": replace(OUTER, np_target="gate", np_affine=False),
    "outer triple": OUTER,
    "outer fc1": replace(OUTER, np_target="fc1", npt_layers="all"),
}
TOKENS = torch.arange(32).view(2, 16) * 5 % VOCAB_SIZE
POSITIONS = torch.arange(16).expand_as(TOKENS)


def _model_config(settings: NPTModuleConfig) -> ModelConfig:
    return replace(TINY, swiglu=settings.is_gated, attention_backend="local", init_method_std=0.1)


def _build(settings: NPTModuleConfig | None, model: ModelConfig, bf16: bool = False) -> GPTModel:
    initialize(SINGLE, seed=7)
    families = [NPTFamily(settings)] if settings else []
    extensions: list[Any] = [family.extension() for family in families]
    chunks = build_model(
        model,
        SINGLE,
        vocab_size=VOCAB_SIZE,
        seed=7,
        precision="bf16" if bf16 else "fp32",
        extensions=extensions,
    )
    for family in families:
        family.prepare_model(chunks)
    return chunks[0]


def _losses(chunk: GPTModel) -> torch.Tensor:
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    return chunk(TOKENS, POSITIONS, mask, labels=TOKENS)


def test_the_family_comes_back_from_a_checkpoints_json() -> None:
    family = NPTFamily(OUTER)
    again = NPTFamily.from_configuration(json.loads(json.dumps(family.configuration())))
    assert again.settings == OUTER


def _counts() -> dict[str, tuple[int, int, int, int]]:
    """Parameters, FLOPs of a forward pass, and both for the base model alone."""
    found = {}
    for name, settings in SETTINGS.items():
        numbers = []
        for chunk in (_build(settings, _model_config(settings)), _build(None, _model_config(settings))):
            with FlopCounterMode(display=False) as counter:
                _losses(chunk)
            numbers += [sum(p.numel() for p in chunk.parameters()), counter.get_total_flops()]
        found[name] = (numbers[0], numbers[1], numbers[2], numbers[3])
    return found


def test_parameters_and_flops_equal_those_of_the_built_model() -> None:
    for name, (parameters, flops, base_parameters, base_flops) in run_single(_counts).items():
        model = _model_config(SETTINGS[name])
        cost = NPTFamily(SETTINGS[name]).cost(model)
        assert (base_parameters, base_flops) == (
            model_cost(model, VOCAB_SIZE).parameters,
            model_cost(model, VOCAB_SIZE).forward_flops_per_token * TOKENS.numel(),
        )
        assert cost.parameters == parameters - base_parameters, name
        assert cost.forward_flops_per_token * TOKENS.numel() == flops - base_flops, name


def test_flops_of_a_single_target_are_those_of_the_formula() -> None:
    model = _model_config(OUTER)
    single = replace(OUTER, np_target="single", np_affine=False)
    layer = 2 * 2 * 4 * (2 * model.hidden_size + model.resolved_ffn_hidden_size)
    assert NPTFamily(single).cost(model).forward_flops_per_token == 2 * layer


def _backward_flops() -> tuple[int, int, int]:
    """All-layers model: FLOPs of a backward pass with the base frozen, of the forward pass, and NPT's part of it."""
    settings = replace(LOW_RANK, npt_layers="all")
    model = _model_config(settings)
    chunk = _build(settings, model)
    with FlopCounterMode(display=False) as counter:
        loss = _losses(chunk).mean()
        forward = counter.get_total_flops()
        loss.backward()
    np_flops = int(NPTFamily(settings).cost(model).forward_flops_per_token * TOKENS.numel())
    return counter.get_total_flops() - forward, forward, np_flops


def test_frozen_weights_get_no_gradient_products() -> None:
    """One product a base weight in the backward pass instead of two: less than the forward pass and twice NPT's."""
    backward, forward, np_flops = run_single(_backward_flops)
    model = _model_config(LOW_RANK)
    attention = 4 * model.seq_length * model.hidden_size * model.num_layers * TOKENS.numel()
    # Core attention has no weights: its two products have two gradients each.
    assert backward <= forward + attention + np_flops


def _off(settings: NPTModuleConfig, bf16: bool) -> dict[str, bool]:
    """Whether losses and all gradients are those of the base model, to the bit, in training with dropout."""
    model = _model_config(settings)
    model = replace(model, hidden_dropout=0.1, attention_dropout=0.1, disable_bias_linear=False)
    results = []
    for chosen in (replace(settings, freeze_base=False, npt_layers="all"), None):
        chunk = _build(chosen, model, bf16)
        with deactivated([chunk]):
            losses = _losses(chunk)
            losses.float().mean().backward()
        gradients = {name: p.grad for name, p in chunk.named_parameters() if ".feed_forward." not in name}
        untouched = all(p.grad is None for name, p in chunk.named_parameters() if ".feed_forward." in name)
        results.append((losses, gradients, untouched))
    (ours, our_gradients, untouched), (base, gradients, _) = results
    same = {name: torch.equal(our_gradients[name], gradient) for name, gradient in gradients.items()}
    return {**same, "losses": torch.equal(ours, base), "no NP gradient": untouched}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["outer triple", "outer fc1", "key_value triple"])
def test_with_all_layers_off_the_model_is_the_base_model_bit_for_bit(name: str, bf16: bool) -> None:
    same = run_single(_off, SETTINGS[name], bf16)
    assert all(same.values()), [name for name, equal in same.items() if not equal]


def _partly_off() -> tuple[bool, bool, bool]:
    """One of two layers off equals a model that has the other only; all on again afterwards, errors included."""
    settings = replace(LOW_RANK, np_init_scale=1.0)
    model = _model_config(settings)
    both, first = _build(settings, model), _build(replace(settings, npt_layers="0"), model)
    on = _losses(both)
    with deactivated([both], layers=[3]):
        one_off = _losses(both)
    with pytest.raises(RuntimeError), deactivated([both]):
        raise RuntimeError
    assert all(module.active for module in np_modules([both]).values())
    return torch.equal(one_off, _losses(first)), torch.equal(on, one_off), torch.equal(on, _losses(both))


def test_single_layers_can_be_off() -> None:
    assert run_single(_partly_off) == (True, False, True)


@dataclass(frozen=True)
class MakeNPT:
    """Makes the families of a run; travels to the processes by pickle."""

    settings: NPTModuleConfig

    def __call__(self) -> list[Family]:
        return [NPTFamily(self.settings)]


def _optimizer_parameters(freeze: bool) -> tuple[set[str], set[str], set[str]]:
    """Names of what the optimizer holds, of NP parameters, and of all."""
    make = MakeNPT(replace(LOW_RANK, freeze_base=freeze))
    run = TinyRun(RunSettings(parallel=SINGLE, checkpoint=CheckpointConfig(), make_families=make))
    names = {id(p): name for chunk in run.chunks for name, p in chunk.named_parameters()}
    held = {names[id(p)] for group in run.optimizer.param_groups for p in group["params"]}
    return held, {name for name in names.values() if ".feed_forward." in name}, set(names.values())


def test_with_the_base_frozen_the_optimizer_holds_np_parameters_only() -> None:
    held, np_names, _ = run_single(_optimizer_parameters, True)
    assert held == np_names and len(held) == 2 * (2 + 2 + 3)
    held, _, names = run_single(_optimizer_parameters, False)
    assert held == names


def _np_factor_errors() -> list[str]:
    chunk = _build(OUTER, _model_config(OUTER))
    before = gather_np_factors([chunk])
    key = "layer_2_np.gate.W_down.1"
    missing = {name: tensor for name, tensor in before.items() if name != key}
    other_rank = {**before, key: before[key][:, :3]}
    unknown = {**before, "layer_1_np.gate.W_down.1": before[key]}
    errors = []
    for tensors in (missing, other_rank, unknown, {}):
        doubled = {name: 2 * tensor for name, tensor in tensors.items()}
        with pytest.raises(ValueError, match="do not fit") as error:
            load_np_factors([chunk], doubled)
        errors.append(str(error.value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gather_np_factors([chunk]).items())
    return errors


def test_np_factors_that_do_not_fit_are_refused_with_the_differences_and_changes_nothing() -> None:
    missing, other_rank, unknown, nothing = run_single(_np_factor_errors)
    prefix = "the NP weights do not fit the model; "
    assert missing == f"{prefix}missing: layer_2_np.gate.W_down.1"
    assert (
        other_rank
        == f"{prefix}of the wrong shape: layer_2_np.gate.W_down.1 has shape [32, 3] instead of [32, 4]"
    )
    assert unknown == f"{prefix}unknown: layer_1_np.gate.W_down.1"
    assert nothing.endswith("and 43 more")
