"""Translates this project's configuration into megatron-core's `TransformerConfig`.

No other module builds a `TransformerConfig`. It does not contain the settings of model families.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.ops.positions.rope_scaling import rotary_scale
from megatron_ext.models.transformer_engine import uses_te
from megatron_ext.platform.process_groups import use_cuda

_FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}

NO_CUDA_GRAPHS: dict[str, list[str]] = {
    # The engine's default, "full", is deprecated in every version; 0.18 renamed the field.
    ("cuda_graph_modules" if "cuda_graph_modules" in _FIELDS else "cuda_graph_scope"): []
}
"""Arguments of `TransformerConfig` that turn off the capture of CUDA graphs."""

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Types of parameters and activations."""


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, precision: Precision = "fp32"
) -> TransformerConfig:
    """Returns megatron-core's configuration for the base model and its parallel layout.

    Args:
        model: size and architecture of the base model.
        parallel: the parallel layout, and which activations are recomputed.
        precision: precision of parameters and activations.
    """
    dtype = DTYPES[precision]
    pipeline, virtual = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_size(model.num_layers),
    )
    overlaps = parallel.overlap_p2p_communication and virtual is not None
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.resolved_ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.resolved_num_query_groups,
        kv_channels=model.resolved_kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        gated_linear_unit=model.is_gated,
        activation_func=_activation(model),
        # Despite its name, this flag makes the engine build the activation that the layer spec names, which is ours.
        use_te_activation_func=model.is_gated,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        softmax_scale=model.softmax_scale,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        attention_softmax_in_fp32=True,
        # `initialize_parameters` sets every value later. The engine's own initialization must still run, because it
        # also marks sharded parameters; without these marks the gradient norm omits tensor-parallel ranks 1 and up.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        init_method_std=model.init_method_std,
        use_cpu_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=_recompute_modules(parallel),
        # With True, forward and backward tensors are sent in one batch, and gloo gives wrong gradients with
        # interleaving.
        batch_p2p_comm=False,
        overlap_p2p_comm=overlaps,
        # With overlap, a stage's output is freed while it is still being sent. NCCL keeps the memory until then, gloo
        # does not.
        deallocate_pipeline_outputs=pipeline > 1 and (use_cuda() or not overlaps),
        fp8=model.fp8_format,
        fp8_recipe=model.fp8_recipe,
        fp8_amax_history_len=model.fp8_amax_history_len,
        fp8_amax_compute_algo=model.fp8_amax_compute_algo,
        cross_entropy_loss_fusion=parallel.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=parallel.cross_entropy_fusion_impl,
        gradient_accumulation_fusion=False,
        no_rope_freq=[int(is_without) for is_without in model.without_rotary] if model.no_rope_freq else None,
        # Transformer Engine's kernel can neither select one of two embeddings in a tensor (see `take_rotary`) nor
        # scale its result.
        apply_rope_fusion=uses_te(model) and not model.has_two_rotaries and rotary_scale(model) == 1.0,
        bias_dropout_fusion=use_cuda(),
        masked_softmax_fusion=False,
        **NO_CUDA_GRAPHS,
    )
    # This is not a field of the dataclass. If the attribute is set, the engine sums the gradients of parameters
    # marked `pipeline_parallel` over the stages. An example is PLE's shared norm weight, which all stages hold.
    config.has_cond_embedder = True
    return config


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return F.silu
    if model.squared_relu:
        return squared_relu
    return tanh_gelu if model.bias_gelu_fusion else F.gelu


def squared_relu(values: torch.Tensor) -> torch.Tensor:
    """Returns max(values, 0)^2; the engine's own function starts a compiler."""
    return F.relu(values).square()


def tanh_gelu(values: torch.Tensor) -> torch.Tensor:
    """Returns GELU in its tanh approximation: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return F.gelu(values, approximate="tanh")


def _recompute_modules(parallel: ParallelConfig) -> list[str] | None:
    if parallel.recompute_granularity != "selective":
        return None
    return list(parallel.recompute_modules)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight
