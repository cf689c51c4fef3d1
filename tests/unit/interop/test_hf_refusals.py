"""What cannot be imported or exported is told in one line that names it, and nothing is left behind."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop import export_checkpoint, export_hf, import_checkpoint, load_hf
from megatron_ext.interop.formats.configs.hf_config import (
    choose_architecture,
    from_model_config,
    to_model_config,
)
from megatron_ext.interop.output_directory import complete_directory
from megatron_ext.testing.tiny_training import TINY
from tests.unit.interop.hf_models import KINDS, SIZES

LLAMA = replace(TINY, untie_embeddings_and_output_weights=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a single file of weights."""
    path = tmp_path_factory.mktemp("saved") / "hf"
    KINDS["Llama"].build().save_pretrained(path)
    return path


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


_ROPE = "rope scaling {}: only default, linear, llama3, dynamic, yarn can be imported for llama"
MISTAKES: dict[str, Callable[[Path], Any]] = {
    "no such directory": shutil.rmtree,
    "no config.json in it": lambda folder: (folder / "config.json").unlink(),
    "config.json: is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config.json: is not a JSON object": lambda folder: (folder / "config.json").write_text("[]"),
    "architectures GemmaForCausalLM: must be one of LlamaForCausalLM": _config(
        architectures=["GemmaForCausalLM"]
    ),
    "model_type gpt2: must be one of llama": _config(architectures=None, model_type="gpt2"),
    "hidden_act gelu: must be silu": _config(hidden_act="gelu"),
    r"quantization_config .*: gptq weights cannot be imported; save them dequantized": _config(
        quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    _ROPE.format("longrope"): _config(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
    _ROPE.format("su"): _config(rope_scaling={"type": "su", "factor": 2.0}),
    "model_type mixtral: is a mixture of experts .num_local_experts 8., which cannot be imported": _config(
        model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8
    ),
    "rope scaling llama3: low_freq_factor is missing": _config(
        rope_scaling={"rope_type": "llama3", "factor": 2.0}
    ),
    "hidden_size null: transformers requires int": _config(hidden_size=None),
    "num_key_value_heads 3: must divide num_attention_heads 4": _config(num_key_value_heads=3),
    "--seq-length 65: must be at most 64, the maximum position in .*config.json": lambda folder: 65,
    "model.layers.1.mlp.up_proj.weight is missing": _weights(
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "model.layers.0.x and 1 more are not part of the model": _weights(
        lambda tensors: tensors.update({"model.layers.0.x": torch.ones(1), "model.layers.0.y": torch.ones(1)})
    ),
    r"model.norm.weight has shape \[31\], but config.json requires \[32\]": _weights(
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})
    ),
    "model.norm.weight has dtype I64, must be one of F32, BF16, F16": _weights(
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.long)})
    ),
    "config.json ties lm_head.weight to the embedding, but they differ": _config(tie_word_embeddings=True),
    "model.safetensors: is damaged or not a safetensors file": _truncate,
    "holds pytorch_model.bin: pickled weights, which are not read": _pickle_only,
    "neither model.safetensors nor model.safetensors.index.json": lambda folder: (
        folder / "model.safetensors"
    ).unlink(),
    "model-2.safetensors is missing": _index({"a": "model.safetensors", "b": "model-2.safetensors"}),
    "/etc/x: must be the name of a file in the same directory": _index({"a": "/etc/x"}),
    "has no weight_map": _index({}),
    "lm_head.weight is in model.safetensors, but the index does not list it": _index(
        {"model.norm.weight": "model.safetensors"}
    ),
    "--model-dir .*tokenizer.json cannot be read as a tokenizer": lambda folder: (
        (folder / "tokenizer.json").write_text("{}") and None
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_left(message: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved, folder)
    seq_length = MISTAKES[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        import_checkpoint(
            folder, tmp_path / "out" / "ckpt", seq_length=seq_length if message.startswith("--seq") else None
        )
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_not_written_into(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ValueError, match=f"--save {tmp_path}: is not empty"):
        import_checkpoint(saved, tmp_path)
    with pytest.raises(ValueError, match="--save .*kept: is a file; give a directory"):
        import_checkpoint(saved, tmp_path / "kept")
    with pytest.raises(ValueError, match=f"--model-dir {tmp_path}: is not empty"):
        export_checkpoint("nowhere", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_tied_head_saved_beside_the_embedding_and_old_rotary_buffers_are_harmless(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "hf")
    _config(tie_word_embeddings=True)(tmp_path / "hf")

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _weights(tie)(tmp_path / "hf")
    assert "output_layer.weight" not in load_hf(tmp_path / "hf").state


def test_a_sliding_window_is_taken_over_and_does_not_bound_the_longest_position(
    saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "hf")
    _config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=20)(tmp_path / "hf")
    found = load_hf(tmp_path / "hf")
    assert found.model.max_position_embeddings == found.model.seq_length == SIZES["max_position_embeddings"]
    assert found.model.window_size == "19,0"
    assert set(found.model.windows) == {20}
    assert not any("window" in message for message in found.messages)
    _config(sliding_window=None)(tmp_path / "hf")
    assert load_hf(tmp_path / "hf").model.window_size is None


def test_what_an_earlier_version_imported_without_its_window_is_exported_with_it() -> None:
    imported = {
        **SIZES,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 20,
        "max_position_embeddings": 64,
    }
    now = to_model_config(imported, "config.json").model
    earlier = replace(
        now,
        window_size=None,
        window_attn_skip_freq=None,
        sliding_window=20,
        max_position_embeddings=20,
        seq_length=20,
    )
    for model in (now, earlier):
        config = from_model_config(model, 96, "MistralForCausalLM", "float32", imported)
        assert (config["sliding_window"], config["max_position_embeddings"]) == (20, 64)


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"window_size": "7,0"}, "MistralForCausalLM"),
        ({"window_size": "7,0", "qk_layernorm": True, "window_attn_skip_freq": "2"}, "Qwen3ForCausalLM"),
        ({"window_size": "7,0", "add_qkv_bias": True, "window_attn_skip_freq": "2"}, "Qwen2ForCausalLM"),
    ],
)
def test_a_model_of_ones_own_with_windows_is_exported_as_what_has_them(
    changes: dict[str, Any], architecture: str
) -> None:
    model = replace(LLAMA, **changes)
    assert choose_architecture(model) == architecture
    config = from_model_config(model, 96, architecture, "float32")
    assert to_model_config(config, "config.json").model.windows == model.windows
    assert getattr(transformers, architecture).config_class.from_dict(config).sliding_window == 8


OLMO: dict[str, Any] = {"post_norm": True, "qk_projection_norm": True}
SCALED: dict[str, Any] = {
    "use_rope_scaling": True,
    "rope_scaling_factor": 2.0,
    "rope_original_max_position_embeddings": 16,
}
LONG: dict[str, Any] = {
    "rope_scaling_type": "longrope",
    "rope_short_factors": (1.0,) * 4,
    "rope_long_factors": (3.0,) * 4,
}


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        (OLMO, "Olmo2ForCausalLM"),
        ({**OLMO, "window_size": "7,0", "window_attn_skip_freq": "2"}, "Olmo3ForCausalLM"),
        ({"no_rope_freq": "2"}, "SmolLM3ForCausalLM"),
        (
            {"no_rope_freq": "[1,0,0,1]", "window_size": "7,0", "window_attn_skip_freq": "2"},
            "SmolLM3ForCausalLM",
        ),
        ({"residual_multiplier": 0.5, "logit_divisor": 2.0, "softmax_scale": 0.3}, "GraniteForCausalLM"),
        ({"embedding_multiplier": 3.0, "add_mlp_bias": True}, "GraniteForCausalLM"),
        ({"rotary_percent": 0.5}, "Phi3ForCausalLM"),
        ({**SCALED, **LONG, "rope_attention_factor": 1.5}, "Phi3ForCausalLM"),
        ({**SCALED, "rope_scaling_type": "yarn", "rope_high_freq_factor": 32.0}, "LlamaForCausalLM"),
        ({**SCALED, "rope_scaling_type": "dynamic", "max_position_embeddings": 32}, "LlamaForCausalLM"),
    ],
)
def test_a_model_of_ones_own_with_other_pieces_is_exported_as_what_has_them(
    changes: dict[str, Any], architecture: str
) -> None:
    model = replace(LLAMA, **changes)
    assert choose_architecture(model) == architecture
    config = from_model_config(model, 96, architecture, "float32")
    found = to_model_config(config, "config.json").model
    assert {name: getattr(found, name) for name in changes} == changes


@pytest.mark.parametrize(
    "changes",
    [
        {"post_norm": True},
        {"qk_projection_norm": True},
        {**OLMO, "residual_multiplier": 0.5},
        {"no_rope_freq": "2", "logit_divisor": 2.0},
        {**SCALED, **LONG, "add_qkv_bias": True},
    ],
)
def test_a_model_with_pieces_that_no_architecture_has_together_is_not_exported(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="no Llama-like architecture can express"):
        choose_architecture(replace(LLAMA, **changes))


GEMMA = replace(
    LLAMA,
    swiglu=False,
    geglu=True,
    apply_layernorm_1p=True,
    sandwich_norm=True,
    qk_layernorm=True,
    embedding_multiplier=32**0.5,
    softmax_scale=0.25,
    final_logit_softcapping=4.0,
    window_size="7,0",
    window_attn_skip_freq="2",
    rotary_base_local=100.0,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": None, "window_attn_skip_freq": None, "rotary_base_local": None},
        {"rotary_seq_len_interpolation_factor": 8.0, "add_qkv_bias": True, "add_attention_output_bias": True},
    ],
)
def test_a_model_of_ones_own_with_all_of_gemmas_pieces_is_exported_as_gemma_3(
    changes: dict[str, Any],
) -> None:
    model = replace(GEMMA, **changes)
    assert choose_architecture(model) == "Gemma3ForCausalLM"
    config = from_model_config(model, 96, "Gemma3ForCausalLM", "float32")
    found = to_model_config(config, "config.json").model
    resolved: dict[str, Any] = {
        "kv_channels": 8,
        "max_position_embeddings": 16,
        "make_vocab_size_divisible_by": 32,
    }
    assert found == replace(model, **resolved)


@pytest.mark.parametrize(
    "changes",
    [
        {"sandwich_norm": False},
        {"apply_layernorm_1p": False},
        {"qk_layernorm": False},
        {"embedding_multiplier": 1.0},
        {"softmax_scale": 0.3},
        {"rotary_base_local": None, "rotary_seq_len_interpolation_factor": 8.0},
    ],
)
def test_a_model_with_a_part_of_gemmas_pieces_is_not_exported(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no Llama-like architecture can express .* norms, scales"):
        choose_architecture(replace(GEMMA, **changes))


def test_windows_in_some_layers_of_a_llama_are_refused_by_name() -> None:
    model = replace(LLAMA, window_size="7,0", window_attn_skip_freq="2")
    with pytest.raises(ValueError, match="sliding windows; use SmolLM3ForCausalLM"):
        choose_architecture(model, "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_absolute"),
        ({"swiglu": False}, "an MLP without a gate .* requires --swiglu or --geglu"),
        (
            {"qk_layernorm": True, "add_qkv_bias": True},
            "no Llama-like architecture can express this model's combination",
        ),
    ],
)
def test_a_model_that_no_llama_family_config_expresses_is_refused(
    changes: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=flag):
        export_hf(replace(LLAMA, **changes), 96, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        (LLAMA, "LlamaForCausalLM"),
        (replace(LLAMA, disable_bias_linear=False), "LlamaForCausalLM"),
        (replace(LLAMA, add_qkv_bias=True), "Qwen2ForCausalLM"),
        (replace(LLAMA, qk_layernorm=True), "Qwen3ForCausalLM"),
    ],
)
def test_the_architecture_follows_from_biases_and_norms(model: ModelConfig, architecture: str) -> None:
    assert choose_architecture(model) == architecture
    with pytest.raises(ValueError, match="--architecture GemmaForCausalLM: must be one of"):
        choose_architecture(model, "GemmaForCausalLM")
    if architecture != "LlamaForCausalLM":
        with pytest.raises(ValueError, match="--architecture MistralForCausalLM: cannot express"):
            choose_architecture(model, "MistralForCausalLM")


def test_tensors_that_are_missing_or_superfluous_stop_an_export(saved: Path, tmp_path: Path) -> None:
    found = load_hf(saved)
    tensors = dict(found.state)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    for state, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"lacks {name}"),
        (
            {**tensors, "extra": torch.ones(1)},
            r"no Llama-like model has: extra \(number of such tensors: 1\)",
        ),
        (
            {**tensors, name: torch.ones(3)},
            rf"{name}: the configuration requires shape \[32, 48\], got \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_hf(found.model, found.vocab_size, state, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_the_range_of_fp16_is_named_and_not_exported_as_infinity(
    saved: Path, tmp_path: Path
) -> None:
    # Gemma 3's norms have such weights: public issue 36822 of transformers.
    found = load_hf(saved)
    name = "decoder.layers.1.input_layernorm.weight"
    state = {**found.state, name: torch.full((32,), 70_000.0)}
    message = r"--dtype float16: model.layers.1.input_layernorm.weight has the value 70000, .* use bfloat16"
    with pytest.raises(ValueError, match=message):
        export_hf(found.model, found.vocab_size, state, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())
    export_hf(found.model, found.vocab_size, state, tmp_path / "out", dtype="bfloat16")


def test_a_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError, match="not empty"), complete_directory(target, "--save"):
        pass
    with pytest.raises(OSError, match=re.escape(f"--save {target}: could not be written (disk full)")):
        _write(target, OSError(28, "disk full"))
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "old"]
    # A kill between setting the old one aside and renaming the new one.
    target.rename(tmp_path / ".target.replaced")
    with pytest.raises(KeyboardInterrupt):
        _write(target, KeyboardInterrupt())
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "old"]
    _write(target)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]


def _write(target: Path, error: BaseException | None = None) -> None:
    with complete_directory(target, "--save", overwrite=True) as folder:
        (folder / "new").touch()
        if error is not None:
            raise error
