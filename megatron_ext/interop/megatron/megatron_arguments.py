"""Translates the arguments in a Megatron-LM checkpoint into a `ModelConfig`, and back.

Every argument of the model is in one of these tables:

    `TAKEN`            read here
    `HARMLESS`         refused unless it has one of the listed values
    `WITHOUT_EFFECT`   changes only speed, memory, rounding or initial values, or refines a feature that `HARMLESS`
                       refuses

Names are those of the command line or, for arguments that Megatron-LM passes on, of megatron-core's configuration.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.layer_windows import skip_frequency, window_tokens
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.megatron.inert_pickle import Inert

TAKEN = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "seq_length", "max_position_embeddings", "position_embedding_type",
    "use_rotary_position_embeddings", "rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor",
    "normalization", "layernorm_epsilon", "norm_epsilon", "swiglu", "add_bias_linear", "disable_bias_linear",
    "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "hidden_dropout", "attention_dropout",
    "init_method_std", "gated_linear_unit", "activation_func", "bias_gelu_fusion", "squared_relu",
    "apply_layernorm_1p", "layernorm_zero_centered_gamma", "window_size", "window_attn_skip_freq",
}  # fmt: skip

HARMLESS: dict[str, tuple[Any, ...]] = {
    # Norms and residuals
    "apply_residual_connection_post_layernorm": (False, None),
    "fused_residual_rmsnorm": (False, None),
    # Positions
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "rope_type": (None, "rope"),
    # Attention
    "multi_latent_attention": (False, None),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "linear_attention_type": (None,),
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "attention_output_gate": (False, None),
    "qk_l2_norm": (False, None),
    "qk_clip": (False, None),
    # MLP
    "quick_geglu": (False, None),
    "openai_gelu": (False, None),
    "onnx_safe": (False, None),
    "glu_linear_offset": (0, None),
    "activation_func_clamp_value": (None,),
    # Other models
    "num_experts": (None, 0),
    "num_moe_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False, None),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_block_specs": (False, None),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "use_mup": (False, None),
    "spec": (None,),
    "use_legacy_models": (False, None),
    "yaml_cfg": (None,),
    "fp4_param": (False, None),
    "fp4_param_gather": (False, None),
}
"""Maps unsupported arguments to the values with which they change nothing."""

WITHOUT_EFFECT = {
    # Initial values and training
    "init_method", "output_layer_init_method", "embedding_init_method", "embedding_init_method_std",
    "init_model_with_meta_device", "calculate_per_token_loss", "qk_clip_alpha", "qk_clip_threshold",
    "log_max_attention_logit", "test_mode",
    # Rounding and kernels
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection", "attention_backend",
    "disable_bf16_reduced_precision_matmul", "bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm",
    "memory_efficient_layer_norm", "bias_dropout_fusion", "apply_rope_fusion", "use_fused_weighted_squared_relu",
    "fused_single_qkv_rope", "activation_func_fp8_input_store", "use_te_activation_func", "batch_invariant_mode",
    "transformer_impl", "symmetric_ar_type", "quant_recipe", "disable_parameter_transpose_cache",
    "tp_only_amax_red", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
    "flash_attention_version", "fp8", "fp4", "use_transformer_engine_op_fuser", "use_grouped_gemm_for_dense_mlp",
    "use_grouped_gemm_for_shared_expert",
    # Speed, memory and the parallel layout
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "distribute_saved_activations",
    "cp_comm_type", "enable_cuda_graph", "external_cuda_graph", "clone_scatter_output_in_embedding",
    "config_logger_dir", "flash_decode", "use_te_rng_tracker", "use_inference_optimized_layers",
    "mlp_chunks_for_prefill", "mlp_chunks_for_training", "hetereogenous_dist_checkpoint",
    "fine_grained_activation_offloading", "fine_grained_offloading_max_inflight_offloads", "offload_modules",
    "min_offloaded_tensor_size", "activation_offload_fraction", "delay_offload_until_cuda_graph",
    "delta_offload_bytes_across_pp_ranks", "high_priority_a2a_comm_stream", "nccl_all_reduce_for_prefill",
    # For other kinds of attention, which are refused
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "experimental_attention_variant_loss_scale_func", "use_mamba_mem_eff_path",
}  # fmt: skip

WITHOUT_EFFECT_BEGINNINGS = (
    "fp8_",  # weights kept in FP8 are stored in the dtype of the other weights
    "fp4_", "use_kitchen", "kitchen_", "recompute_", "cuda_graph_", "inference_",
    "moe_", "mamba_", "dsa_", "mup_", "mtp_",  # for other kinds of models, which are refused
)  # fmt: skip
"""Prefixes of further names that count as `WITHOUT_EFFECT`; names in `HARMLESS` take precedence."""

ADVICE = {
    "rotary_seq_len_interpolation_factor": "pretrain_gpt.py ignores this value, but other programs use it; so it is "
    "unclear how the model was trained",
    "fp4_param": "weights in FP4 are not read; save them in bf16",
    "fp4_param_gather": "weights in FP4 are not read; save them in bf16",
}

_EXPORTED_AS = {
    "norm_epsilon": "layernorm_epsilon",
    "num_query_groups": "num_query_groups",
    **{
        name: name
        for name in (
            "num_layers", "hidden_size", "num_attention_heads", "seq_length", "position_embedding_type", "rotary_base",
            "rotary_percent", "use_rope_scaling", "normalization", "swiglu", "add_qkv_bias", "qk_layernorm",
            "untie_embeddings_and_output_weights", "hidden_dropout", "attention_dropout", "init_method_std",
            "bias_gelu_fusion", "squared_relu", "apply_layernorm_1p",
        )
    },
}  # fmt: skip
_EXPORTED_OTHERWISE = {
    "ffn_hidden_size", "group_query_attention", "kv_channels", "max_position_embeddings", "disable_bias_linear",
    "make_vocab_size_divisible_by", "window_size", "window_attn_skip_freq",
}  # fmt: skip
_OF_THE_RUN = {
    "attention_backend", "transformer_impl", "fp8_format", "fp8_recipe", "fp8_amax_history_len",
    "fp8_amax_compute_algo",
}  # fmt: skip

_ENGINE_ROPE_FACTOR = 8.0
"""Factor of `--use-rope-scaling` in Megatron-LM's GPT models, which do not read `--rope-scaling-factor`."""


def is_known(name: str) -> bool:
    """Returns whether an argument is in one of the tables."""
    listed = name in TAKEN or name in HARMLESS or name in WITHOUT_EFFECT
    return listed or name.startswith(WITHOUT_EFFECT_BEGINNINGS)


def read_model(
    arguments: Mapping[str, Any], vocab_size: int, rows: int, source: str, *, seq_length: int | None = None
) -> tuple[ModelConfig, list[str]]:
    """Returns the model that a checkpoint's arguments describe, and messages for the user.

    Args:
        arguments: the arguments by name.
        vocab_size: the tokenizer's vocabulary size.
        rows: number of rows of the word embedding.
        source: path of the file with the arguments, for error messages.
        seq_length: tokens per training sequence; the default is the checkpoint's.

    Raises:
        ValueError: an argument is missing, or the model cannot be built here; the message names the argument.
    """
    _check_harmless(arguments, source)
    given = _Arguments(arguments, source)
    fields, messages = _fields(given)
    length = seq_length or given("seq_length")
    positions = given("max_position_embeddings", length)
    if seq_length is not None and seq_length > positions:
        raise ValueError(
            f"--seq-length {seq_length}: must be at most {positions}, the maximum position in {source}"
        )
    fields |= {"seq_length": length, "max_position_embeddings": max(positions, length)}
    fields["make_vocab_size_divisible_by"] = _divisor(given, vocab_size, rows)
    try:
        return ModelConfig(**fields), messages
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: describes a model that cannot be built ({error})") from None


class _Arguments:
    """The arguments by name. A call with a default returns the default if the argument is missing or None."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self._source = values, source

    def __call__(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None or isinstance(value, Inert):
            raise ValueError(
                f"{self._source}: the argument {name} is missing, so this is not a checkpoint of pretrain_gpt.py"
            )
        return value


def _check_harmless(arguments: Mapping[str, Any], source: str) -> None:
    for name, values in HARMLESS.items():
        value = arguments.get(name)
        if value not in values and value is not None:
            reason = ADVICE.get(name, "the models of this package do not support it")
            raise ValueError(f"{source}: {flag_name(name)} {_shown(value)}: cannot be imported; {reason}")


def _shown(value: Any) -> str:
    text = "(not readable)" if isinstance(value, Inert) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(given: _Arguments) -> tuple[dict[str, Any], list[str]]:
    """Returns field values of `ModelConfig`, and messages for the user."""
    heads = given("num_attention_heads")
    messages: list[str] = []
    fields: dict[str, Any] = {
        "num_layers": given("num_layers"),
        "hidden_size": given("hidden_size"),
        "num_attention_heads": heads,
        "ffn_hidden_size": given("ffn_hidden_size"),
        "num_query_groups": given("num_query_groups") if given("group_query_attention", False) else heads,
        "kv_channels": given("kv_channels", given("hidden_size") // heads),
        "normalization": given("normalization", "LayerNorm"),
        "norm_epsilon": given("layernorm_epsilon", given("norm_epsilon", 1e-5)),
        # Versions with the first argument use it and ignore the second.
        "apply_layernorm_1p": given("layernorm_zero_centered_gamma", given("apply_layernorm_1p", False)),
        "swiglu": given("swiglu", False),
        "squared_relu": given("squared_relu", False),
        "disable_bias_linear": not given("add_bias_linear", not given("disable_bias_linear", False)),
        "add_qkv_bias": given("add_qkv_bias", False),
        "qk_layernorm": given("qk_layernorm", False),
        "untie_embeddings_and_output_weights": given("untie_embeddings_and_output_weights", False),
        "hidden_dropout": given("hidden_dropout", 0.1),
        "attention_dropout": given("attention_dropout", 0.1),
        "init_method_std": given("init_method_std", 0.02),
    }
    if not fields["swiglu"] and not fields["squared_relu"] and not fields["disable_bias_linear"]:
        # The fused kernel, Megatron-LM's default, computes GELU's tanh approximation.
        fields["bias_gelu_fusion"] = given("bias_gelu_fusion", True)
    if given("window_size", False):
        fields["window_size"] = _spelled(given("window_size"))
        fields["window_attn_skip_freq"] = _spelled(given("window_attn_skip_freq", "")) or None
    rotates = given("use_rotary_position_embeddings", False)
    kind = "rope" if rotates else given("position_embedding_type", "learned_absolute")
    fields["position_embedding_type"] = kind
    if kind == "rope":
        fields["rotary_base"] = float(given("rotary_base", 10000))
        fields["rotary_percent"] = float(given("rotary_percent", 1.0))
        fields["use_rope_scaling"] = given("use_rope_scaling", False)
        factor = given("rope_scaling_factor", _ENGINE_ROPE_FACTOR)
        if fields["use_rope_scaling"] and factor != _ENGINE_ROPE_FACTOR:
            messages.append(
                f"--rope-scaling-factor {factor}: Megatron-LM's GPT model ignores this argument and "
                f"computes with {_ENGINE_ROPE_FACTOR}; so does the imported model"
            )
    return fields, messages


def _spelled(value: Any) -> str:
    """Returns a number, tuple or list as a flag's value; a tuple without parentheses."""
    return str(value).strip("()").replace(" ", "")


def _divisor(given: _Arguments, vocab_size: int, rows: int) -> int:
    """Returns a value of --make-vocab-size-divisible-by with which the word embedding has `rows` rows."""
    # Megatron-LM pads to a multiple of this product, and trains the added rows like all others.
    product: int = given("make_vocab_size_divisible_by", 128) * given("tensor_model_parallel_size", 1)
    return product if -(-vocab_size // product) * product == rows else rows


def export_arguments(model: ModelConfig, vocab_size: int, rows: int) -> dict[str, Any]:
    """Returns Megatron-LM's arguments for a model, which `--use-checkpoint-args` and the checks of `--load` read.

    Args:
        model: configuration of the base model.
        vocab_size: the tokenizer's vocabulary size.
        rows: number of rows of the word embedding.

    Raises:
        ValueError: Megatron-LM has no such model; the message names the flag.
    """
    _check_expressible(model)
    found = {theirs: getattr(model, ours) for ours, theirs in _EXPORTED_AS.items()}
    grouped = model.resolved_num_query_groups != model.num_attention_heads
    return {
        **found,
        "norm_epsilon": model.norm_epsilon,  # the name of the argument before megatron-core 0.16
        "ffn_hidden_size": model.resolved_ffn_hidden_size,
        "kv_channels": model.resolved_kv_channels,
        "group_query_attention": grouped,
        "num_query_groups": model.resolved_num_query_groups if grouped else 1,
        "max_position_embeddings": model.resolved_max_position_embeddings,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_interleaved": False,
        "rope_scaling_factor": _ENGINE_ROPE_FACTOR,
        "add_bias_linear": not model.disable_bias_linear,
        "layernorm_zero_centered_gamma": model.apply_layernorm_1p,
        **_window_arguments(model),
        "apply_query_key_layer_scaling": False,
        "num_experts": None,
        "vocab_size": vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
    }


def flags_beside_checkpoint(model: ModelConfig) -> str:
    """Returns the model's flags that Megatron-LM (0.17 to 0.19) does not read from a checkpoint."""
    flags = ["--apply-layernorm-1p"] if model.apply_layernorm_1p else []
    for name, value in _window_arguments(model).items():
        if value is not None:
            flags.append(f"{flag_name(name)} {_spelled(value)}")
    return " ".join(flags)


def _window_arguments(model: ModelConfig) -> dict[str, Any]:
    if model.window_size is None:
        return {"window_size": None, "window_attn_skip_freq": None}
    frequency = skip_frequency(tuple(window is not None for window in model.windows))
    return {
        "window_size": (window_tokens(model.window_size) - 1, 0),
        "window_attn_skip_freq": None if frequency is None else ast.literal_eval(frequency),
    }


def _check_expressible(model: ModelConfig) -> None:
    known = {*_EXPORTED_AS, *_EXPORTED_OTHERWISE, *_OF_THE_RUN}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name not in known and value != field.default:
            shown = "" if value is True else f" {value}"
            raise ValueError(
                f"the model was built with {flag_name(field.name)}{shown} and cannot be exported; Megatron-LM has no "
                "such model"
            )
