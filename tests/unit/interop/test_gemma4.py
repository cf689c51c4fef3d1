"""Gemma 4 as Google publishes it: true shapes, the language model beside image and audio, tensors that are not used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ext.config.serialize import group_to_dict
from megatron_ext.interop.formats.configs.hf_config import HFModel, choose_architecture, to_model_config
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.per_layer_layout import exported_per_layer, family_of
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_cost import per_layer_cost
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.run_single import run_single
from tests.unit.interop.hf_models import GEMMA4, KINDS, SIZES, logits_of
from tests.unit.interop.imported_models import imported_logits

COMMON: dict[str, Any] = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
E2B = {
    **COMMON,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}
E4B = {
    **COMMON,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
}
# Parameters of the language model, those of the per-layer table, and those of Google's whole model.
SHAPES = {
    "E2B": (E2B, 4_628_569_344, 2_348_810_240, 5_104_297_504),
    "E4B": (E4B, 7_463_013_376, 2_818_572_288, None),
}


def imported(config: Any) -> HFModel:
    """What an import makes of a configuration that transformers has saved."""
    content = {**json.loads(config.to_json_string()), "architectures": ["Gemma4ForCausalLM"]}
    return to_model_config(content, "config.json")


@pytest.mark.parametrize("name", SHAPES)
def test_true_shapes_have_as_many_parameters_as_in_transformers(name: str) -> None:
    fields, total, table, with_encoders = SHAPES[name]
    config = transformers.Gemma4TextConfig(**fields)
    with torch.device("meta"):
        model: Any = transformers.Gemma4ForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert model.model.embed_tokens_per_layer.weight.numel() == table
    source = imported(config)
    assert source.per_layer == PerLayer(preset="gemma4", width=256)
    settings = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=256
    )
    ours = model_cost(source.model, source.vocab_size).parameters
    ours += per_layer_cost(settings, source.model, source.vocab_size).parameters
    assert ours == total
    if with_encoders is not None:
        whole = transformers.Gemma4Config(text_config=fields, vision_config={}, audio_config={})
        with torch.device("meta"):
            parts: Any = transformers.Gemma4ForConditionalGeneration(whole)
        assert sum(parameter.numel() for parameter in parts.parameters()) == with_encoders


def test_the_imported_settings_are_those_of_the_preset() -> None:
    per_layer = PerLayer(preset="gemma4", width=16)
    stored = family_of(per_layer, 96)
    family = PerLayerFamily.from_configuration(stored)
    assert family.settings == PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=16
    )
    # What a later run compares must be stored.
    compared = group_to_dict(family.settings).keys() - family.free_on_resume
    assert compared <= stored["settings"].keys()
    assert exported_per_layer({"per_layer": family.configuration()}) == per_layer
    others = {**stored["settings"], "per_layer_embed_scale": 2.0}
    assert exported_per_layer({"per_layer": {**stored, "settings": others}}) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A directory with a language model, an image encoder, and unused keys and values; and the model's logits."""
    path = tmp_path_factory.mktemp("gemma4")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZES, **KINDS["Gemma4"].changes, "pad_token_id": 0}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**vision, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        audio_config=None,
    )
    torch.manual_seed(1)
    model: Any = transformers.Gemma4ForConditionalGeneration(config).eval()
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    prefix = "model.language_model.layers.5.self_attn"
    tensors |= {f"{prefix}.k_proj.weight": torch.ones(32, 32), f"{prefix}.k_norm.weight": torch.ones(16)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path, logits_of(model)


def test_the_language_model_of_a_whole_gemma_4_is_imported_alone(whole: tuple[Path, torch.Tensor]) -> None:
    path, expected = whole
    logits, messages = run_single(imported_logits, str(path))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert any("the language model of gemma4; 16 other tensors are left out" in line for line in messages)
    assert any("2 tensors compute keys and values that no layer uses" in line for line in messages)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 6, "num_kv_shared_layers": 0},
        {"num_kv_shared_layers": 3},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"hidden_size_per_layer_input": 0},
    ],
    ids=str,
)
def test_only_gemma_4_expresses_its_parts(changes: dict[str, Any]) -> None:
    source = imported(transformers.Gemma4TextConfig(**{**SIZES, **GEMMA4, **changes}))
    assert choose_architecture(source.model, None, source.per_layer) == "Gemma4ForCausalLM"
    with pytest.raises(ValueError, match="--architecture Gemma3ForCausalLM: cannot express"):
        choose_architecture(source.model, "Gemma3ForCausalLM", source.per_layer)
