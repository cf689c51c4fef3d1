"""The form key_value: exact at full rank, in float64 and against the engine's layer and transformers; its start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.key_value import norm_gain
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.npt_references import reference_feed_forward, reference_norm
from megatron_ext.testing.references import reference_activation
from megatron_ext.testing.run_single import run_single
from tests.unit.interop.hf_models import KINDS, alone, logits_of, tokens
from tests.unit.npt.test_npt_feed_forward import MODEL

HIDDEN, FFN, TOKENS, EPS = 16, 24, 40, 1e-5
DROP = NPTModuleConfig(npt_layers="all", np_form="key_value", np_target="gate+up+down", np_rank=HIDDEN)
KEEP = replace(DROP, np_target="gate+up", np_residual="keep")
NORMS = ("RMSNorm", "LayerNorm")


def exact_factors(settings: NPTModuleConfig, like: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Factors with A B = I, with which the layer equals the base layer; `like` [h] has their type."""
    generator = torch.Generator().manual_seed(6)
    rotation = torch.linalg.qr(torch.randn(len(like), len(like), generator=generator, dtype=torch.float64)).Q
    rotation = rotation.to(like.dtype)
    return {target: {"A": rotation, "B": rotation.t()} for target in settings.targets}


def _inputs(hidden_size: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """h and a [n, h]: tokens of very different sizes, and the attention output as large as the residual stream."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.exp(torch.randn(TOKENS, 1, generator=generator))
    values = torch.randn(2, TOKENS, hidden_size, generator=generator)
    return values[0] * sizes + 0.5, values[1] * sizes.flip(0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("settings", [KEEP, DROP], ids=["keep", "drop"])
def test_at_full_rank_the_deltas_give_the_base_layer_exactly(settings: NPTModuleConfig, norm: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = {"norm": random(HIDDEN), "fc1": random(2 * FFN, HIDDEN), "fc1_bias": random(2 * FFN)}
    base |= {"fc2": random(HIDDEN, FFN), "fc2_bias": random(HIDDEN)}
    if norm == "LayerNorm":
        base["norm_bias"] = random(HIDDEN)
    hidden, a = (value.double() for value in _inputs())
    factors = exact_factors(settings, base["norm"])
    found = reference_feed_forward(settings, base, factors, hidden, a, EPS)
    gate, up = (reference_norm(hidden + a, base, EPS) @ base["fc1"].T + base["fc1_bias"]).chunk(2, dim=-1)
    mlp = (reference_activation(gate, "silu") * up) @ base["fc2"].T + base["fc2_bias"]
    torch.testing.assert_close(found, hidden + a + mlp, rtol=1e-12, atol=1e-11)


def _layer(settings: NPTModuleConfig, norm: Any, zero_centered: bool = False) -> Any:
    initialize(ParallelConfig(), seed=3)
    model = replace(
        MODEL,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        seq_length=TOKENS,
        normalization=norm,
        apply_layernorm_1p=zero_centered,
        disable_bias_linear=False,
        init_method_std=0.3,
    )
    extensions: list[Any] = [NPTExtension(settings)]
    layer: Any = build_model(model, ParallelConfig(), vocab_size=32, seed=3, extensions=extensions)[
        0
    ].decoder.layers[0]
    with torch.no_grad():
        for parameter in [*layer.pre_mlp_layernorm.parameters(), layer.mlp.linear_fc1.bias]:
            parameter.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(4))
    return layer


def _engine_error(settings: NPTModuleConfig, norm: str, zero_centered: bool) -> tuple[float, float]:
    """Of the converted layer against the engine's own, attention included: exact factors, and initial ones."""
    layer = _layer(settings, norm, zero_centered)
    hidden = _inputs()[0].unsqueeze(1)
    with torch.no_grad():
        initial, _ = layer(hidden, attention_mask=None)
        exact = exact_factors(settings, layer.pre_mlp_layernorm.weight)
        for target, factors in exact.items():
            for name, value in factors.items():
                layer.feed_forward.get_submodule(target).get_parameter(name).copy_(value)
        found, _ = layer(hidden, attention_mask=None)
        layer.feed_forward.active = False
        base, _ = layer(hidden, attention_mask=None)
        return tuple(float((value - base).norm() / base.norm()) for value in (found, initial))  # type: ignore[return-value]


@pytest.mark.parametrize("zero_centered", [False, True], ids=["weight", "weight - 1"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("settings", [KEEP, DROP], ids=["keep", "drop"])
def test_at_full_rank_the_layer_equals_the_engines(
    settings: NPTModuleConfig, norm: str, zero_centered: bool
) -> None:
    exact, initial = run_single(_engine_error, settings, norm, zero_centered)
    assert exact < 1e-6 < 1e-2 < initial


def _converted_logits(folder: str, settings: NPTModuleConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """With exact factors, and with the initial ones."""
    model = NPTModel.from_pretrained(folder)
    hidden = model.config.hidden_size
    model.convert_to_npt(replace(settings, np_rank=hidden))
    initial = model.logits(tokens())
    weights: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.decoder.layers):
        exact = exact_factors(settings, layer.pre_mlp_layernorm.weight)
        weights |= {
            f"layer_{number}_np.{target}.{name}": value.detach().contiguous()
            for target, factors in exact.items()
            for name, value in factors.items()
        }
    model.load_npt_weights(weights)
    return model.logits(tokens()), initial


@pytest.mark.parametrize("kind", ["Llama, all biases", "Qwen3"])
@pytest.mark.parametrize("settings", [KEEP, DROP], ids=["keep", "drop"])
def test_a_hugging_face_model_with_all_layers_converted_gives_the_same_logits(
    settings: NPTModuleConfig, kind: str, tmp_path: Path
) -> None:
    model = KINDS[kind].build()
    model.save_pretrained(tmp_path)
    expected = logits_of(model)
    exact, initial = alone(_converted_logits, str(tmp_path), settings)
    scale = float(expected.std())
    assert float((exact - expected).abs().max()) < 2e-5 * scale
    assert float((initial - expected).abs().max()) > 0.1 * scale


def _start() -> tuple[float, float, float, set[str]]:
    """Of a conservative start: its distance from the gain alone, the errors with and without gain, what trains."""
    layer = _layer(replace(DROP, np_init_strategy="conservative"), "RMSNorm")
    hidden, a = (value.unsqueeze(1) for value in _inputs())
    norm, mlp = layer.pre_mlp_layernorm, layer.mlp
    found = layer.feed_forward.mlp_output(layer, hidden, a)
    found.square().sum().backward()
    gain, _ = norm_gain(hidden, a, layer.feed_forward.settings, layer.config)
    outputs = []
    for value in (gain * norm(hidden), norm(hidden), norm(hidden + a)):
        output, bias = mlp(value)
        outputs.append(output + bias)
    scaled, plain, right = outputs
    alive = {name for name, p in layer.feed_forward.named_parameters() if float(p.grad.norm()) > 0}
    with torch.no_grad():
        errors = [float((value - right).norm() / right.norm()) for value in (found, plain)]
        return float((found - scaled).norm()), errors[0], errors[1], alive


def test_a_conservative_start_is_the_gain_alone_which_brings_the_layer_closer() -> None:
    difference, error, without_gain, alive = run_single(_start)
    assert difference < 1e-5
    assert error < without_gain
    assert alive == {"fc1.B", "down.B"}
