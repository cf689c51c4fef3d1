"""Checks that a checkpoint belongs to this run's model, by comparing configurations before any tensor is read.

Training settings (dropout, batch size, the parallel layout, ...) may differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.model.layer_shapes import LAYER_DIFFERENCES
from megatron_ext.config.groups.model.positions import ROPE_SCALING
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.data.tokenizers.tokenizer import in_words
from megatron_ext.training.interface.family_interface import Family

_SHAPE = (
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    *LAYER_DIFFERENCES,
    "v_layernorm",
    "layer_scalar",
    "swiglu",
    "geglu",
    "squared_relu",
    "normalization",
    "apply_layernorm_1p",
    "sandwich_norm",
    "altup_streams",
    "laurel_rank",
    "post_norm",
    "position_embedding_type",
    "sliding_window",
    "disable_bias_linear",
    "add_qkv_bias",
    "add_attention_output_bias",
    "add_mlp_bias",
    "qk_layernorm",
    "qk_projection_norm",
    "softmax_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "logit_divisor",
    "final_logit_softcapping",
    "untie_embeddings_and_output_weights",
)
"""Fields of `ModelConfig` that determine a layer's tensors and computation."""

_MEANING = (
    "rotary_base",
    "rotary_base_local",
    "rotary_percent",
    "rotary_proportion",
    "rotary_seq_len_interpolation_factor",
    "no_rope_freq",
    "use_rope_scaling",
    *ROPE_SCALING,
    "window_size",
    "window_attn_skip_freq",
    "norm_epsilon",
    "altup_coef_clip",
    "mlp_activation_sparsity",
    "bias_gelu_fusion",
)
"""Fields of `ModelConfig` that a fine-tuning run may set differently."""


SHAPE_FIELDS = ("num_layers", *_SHAPE, *_MEANING, "max_position_embeddings")
"""Fields of `ModelConfig` that --use-checkpoint-args takes from the checkpoint."""


def check_same_model(
    run: Mapping[str, Any], stored: Mapping[str, Any], families: list[Family], folder: Path, *, finetune: bool
) -> None:
    """Compares a run's configuration with a checkpoint's.

    Args:
        run: the run's `run_config`, with the sections `model` and `families` and the entry `tokenizer_fingerprint`.
        stored: the checkpoint's `run_config`.
        families: the run's model families; their `free_on_resume` lists the fields that may differ.
        folder: the checkpoint's directory, named in errors.
        finetune: whether the tokenizer, and fields such as the rotary base, may differ.

    Raises:
        ValueError: the models differ; the message names the flag and both values.
    """
    ours = _model(run)
    _same("num_layers", ours.num_layers, _model(stored).num_layers, folder)
    check_same_layers(ours, stored, folder, finetune=finetune)
    if not finetune and run["tokenizer_fingerprint"] != stored["tokenizer_fingerprint"]:
        raise ValueError(
            f"--tokenizer-type: the checkpoint {folder} was trained with another tokenizer "
            f"({tokenizer_in_words(stored)}) than this run's ({tokenizer_in_words(run)}); "
            "to load its weights nevertheless, add --finetune"
        )
    _check_families(run["families"], stored["families"], families, folder)


def tokenizer_in_words(run_config: Mapping[str, Any]) -> str:
    """Describes a run's tokenizer by class, vocabulary size and files."""
    section = run_config.get("tokenizer", {})
    files = [section[name] for name in ("tokenizer_model", "vocab_file", "merge_file") if section.get(name)]
    return in_words(
        {
            "class": section.get("tokenizer_type"),
            "vocab_size": run_config.get("vocab_size"),
            "files": files,
            "fingerprint": run_config["tokenizer_fingerprint"],
        }
    )


def check_same_layers(
    ours: ModelConfig, stored: Mapping[str, Any], folder: Path, *, finetune: bool = False
) -> None:
    """Compares the architecture of the layers, but not their number.

    Args:
        ours: the run's model configuration.
        stored: the checkpoint's `run_config`.
        folder: the checkpoint's directory, named in errors.
        finetune: see `check_same_model`.

    Raises:
        ValueError: the layers differ; the message names the flag and both values.
    """
    theirs = _model(stored)
    for name in _SHAPE if finetune else _SHAPE + _MEANING:
        _same(name, _resolved(ours, name), _resolved(theirs, name), folder)
    if ours.position_embedding_type == "learned_absolute":
        name = "max_position_embeddings"
        _same(name, _resolved(ours, name), _resolved(theirs, name), folder)


def _check_families(
    run: Mapping[str, Any], stored: Mapping[str, Any], families: list[Family], folder: Path
) -> None:
    for name in sorted(set(run) ^ set(stored)):
        there, here = ("uses", "does not use") if name in stored else ("does not use", "uses")
        raise ValueError(f"{folder}: the checkpoint {there} the model family {name}, which this run {here}")
    for family in families:
        ours, theirs = _leaves(run[family.name]), _leaves(stored[family.name])
        for name in sorted(set(ours) | set(theirs)):
            if name not in family.free_on_resume:
                _same(name, ours.get(name), theirs.get(name), folder)


def _same(name: str, ours: object, theirs: object, folder: Path) -> None:
    if ours == theirs:
        return
    if isinstance(ours, list) and isinstance(theirs, list):
        raise ValueError(
            f"{flag_name(name)}: the checkpoint {folder} was made with another value of this flag"
        )
    raise ValueError(f"{flag_name(name)} {ours}: the checkpoint {folder} was made with {theirs}")


def _leaves(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a nested configuration by field name."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= _leaves(value) if isinstance(value, Mapping) else {name: value}
    return found


def _model(configuration: Mapping[str, Any]) -> ModelConfig:
    return group_in(ModelConfig, configuration, "model")


def _resolved(model: ModelConfig, name: str) -> object:
    return getattr(model, f"resolved_{name}", getattr(model, name))
