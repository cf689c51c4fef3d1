"""Gemma 3n as Google publishes it: true shapes, the language model of a whole model, tensors that are not used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.interop.formats.configs.hf_config import HFModel, choose_architecture, to_model_config
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.per_layer_layout import exported_per_layer, family_of
from megatron_ext.interop.formats.weight_layout import unused_tensors
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_cost import per_layer_cost
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.run_single import run_single
from tests.unit.interop.hf_models import GEMMA3N, KINDS, SIZES, logits_of
from tests.unit.interop.imported_models import imported_logits

E2B: dict[str, Any] = {
    "intermediate_size": [8192] * 30,
    "num_hidden_layers": 30,
    "num_kv_shared_layers": 10,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
}
E4B: dict[str, Any] = {}  # the defaults of the class
ENCODERS = 294_126_912 + 681_348_640 + 4_460_544 + 3_345_408
"""Parameters of transformers' encoders for images (with timm) and audio, and of what embeds their output."""

# Parameters of the language model, and those of the per-layer table.
SHAPES = {"E2B": (E2B, 4_435_182_688, 2_013_265_920), "E4B": (E4B, 6_835_235_568, 2_348_810_240)}


def imported(config: Any) -> HFModel:
    """What an import makes of a configuration that transformers has saved."""
    content = {**json.loads(config.to_json_string()), "architectures": ["Gemma3nForCausalLM"]}
    return to_model_config(content, "config.json")


@pytest.mark.parametrize("name", SHAPES)
def test_true_shapes_have_as_many_parameters_as_in_transformers(name: str) -> None:
    fields, total, table = SHAPES[name]
    config = transformers.Gemma3nTextConfig(**fields)
    with torch.device("meta"):
        model: Any = transformers.Gemma3nForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert model.model.embed_tokens_per_layer.weight.numel() == table
    source = imported(config)
    assert source.per_layer == PerLayer(preset="gemma3n", width=256, rows=262144)
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_preset="gemma3n",
        per_layer_hidden_size=256,
        per_layer_vocab_size=262144,
    )
    ours = model_cost(source.model, source.vocab_size).parameters
    ours += per_layer_cost(settings, source.model, settings.rows(source.vocab_size)).parameters
    assert ours == total
    # Google counts 1.91 B in E2B without encoders and both tables; keys and values that no layer uses are among them.
    unused = _unused_parameters(source.model)
    if name == "E2B":
        assert round((total - table - config.vocab_size * config.hidden_size + unused) / 1e9, 2) == 1.91
    assert round((total + ENCODERS + unused) / 1e9) == {"E2B": 5, "E4B": 8}[name]  # in Google's announcement


def _unused_parameters(model: ModelConfig) -> int:
    shapes = {
        "k_proj.weight": model.resolved_num_query_groups * model.resolved_kv_channels * model.hidden_size,
        "v_proj.weight": model.resolved_num_query_groups * model.resolved_kv_channels * model.hidden_size,
        "k_norm.weight": model.resolved_kv_channels,
    }
    names = (name.rpartition("self_attn.")[2] for name in unused_tensors(model))
    return sum(shapes.get(name, 0) for name in names)


def test_the_imported_settings_are_those_of_the_preset() -> None:
    per_layer = PerLayer(preset="gemma3n", width=16, rows=90)
    stored = family_of(per_layer, 96)
    family = PerLayerFamily.from_configuration(stored)
    assert family.settings == PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_preset="gemma3n",
        per_layer_hidden_size=16,
        per_layer_vocab_size=90,
    )
    # What a later run compares must be stored.
    compared = group_to_dict(family.settings).keys() - family.free_on_resume
    assert compared <= stored["settings"].keys()
    assert exported_per_layer({"per_layer": family.configuration()}) == per_layer


@pytest.fixture
def whole(tmp_path: Path) -> torch.Tensor:
    """Writes the tensors of a language model, an image embedding, and unused keys and values; returns its logits."""
    kind = KINDS["Gemma3n"]
    model = kind.build()
    text = {**model.config.to_dict(), "model_type": "gemma3n_text"}
    config = {
        "model_type": "gemma3n",
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.save_pretrained(tmp_path / "text")
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(tmp_path / "text" / "model.safetensors").items()
    }
    prefix = "model.language_model.layers.3.self_attn"
    tensors |= {f"{prefix}.k_proj.weight": torch.ones(24, 32), f"{prefix}.k_norm.weight": torch.ones(12)}
    tensors["model.embed_vision.embedding.weight"] = torch.ones(4, 8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return logits_of(model)


def test_transformers_names_the_tensors_of_the_whole_model_so() -> None:
    tied = transformers.Gemma3nForConditionalGeneration._tied_weights_keys
    assert tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def test_the_language_model_of_a_whole_gemma_3n_is_imported_alone(
    whole: torch.Tensor, tmp_path: Path
) -> None:
    logits, messages = run_single(imported_logits, str(tmp_path))
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)
    assert any("the language model of gemma3n; 1 other tensors are left out" in line for line in messages)
    assert any("2 tensors compute keys and values that no layer uses" in line for line in messages)


@pytest.mark.parametrize("changes", [{}, {"num_kv_shared_layers": 0}, {"altup_num_inputs": 2}], ids=str)
def test_only_gemma_3n_expresses_its_parts(changes: dict[str, Any]) -> None:
    source = imported(transformers.Gemma3nTextConfig(**{**SIZES, **GEMMA3N, **changes}))
    assert choose_architecture(source.model, None, source.per_layer) == "Gemma3nForCausalLM"
    for other in ("Gemma3ForCausalLM", "Gemma4ForCausalLM"):
        with pytest.raises(ValueError, match=f"--architecture {other}: cannot express"):
            choose_architecture(source.model, other, source.per_layer)
    with pytest.raises(ValueError, match="no Llama-like architecture can express"):
        choose_architecture(source.model)
