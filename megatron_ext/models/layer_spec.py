"""Builds the layer spec, which chooses the modules of a transformer layer.

Attention and linear layers are megatron-core's, or Transformer Engine's if it is installed and there is a GPU. Norm
and core attention are this project's by default. Norms are separate modules, because model families read their
outputs. If no family does, Transformer Engine's linear layers compute the norms before them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ext.config.groups.model.layer_shapes import LayerShape
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.attention.extended_self_attention import ExtendedSelfAttention, KeyValueSettings
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs, AuxiliaryStream
from megatron_ext.models.gemma3n.altup import AltUp, JoinStreams
from megatron_ext.models.gemma3n.laurel import Laurel
from megatron_ext.models.gemma3n.sparse_activations import SparseGatedActivation
from megatron_ext.models.model_extension import StageInfo
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.gated_activations import GeGLU, SwiGLU, TESwiGLU
from megatron_ext.models.ops.norm import Norm, ProjectionNorm
from megatron_ext.models.ops.positions.rope_scaling import rotary_scale
from megatron_ext.models.ops.rotary import rotary_part
from megatron_ext.models.transformer_engine import uses_te
from megatron_ext.models.transformer_layer import ExtendedLayerSubmodules, ExtendedTransformerLayer

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Names of a layer's linear modules; the first and third are column-parallel, the second and fourth row-parallel."""


def layer_spec(
    model: ModelConfig,
    auxiliary: AuxiliaryInputs,
    slots: dict[str, ModuleSpec],
    linears: dict[str, ModuleSpec],
    bidirectional: bool = False,
    fuses_norms: bool = False,
    number: int = 0,
    stage: StageInfo | None = None,
) -> ModuleSpec:
    """Returns the spec of one layer.

    Args:
        model: configuration of the base model; chooses the implementations of attention, norm and linear layers.
        auxiliary: layout of the auxiliary streams.
        slots: maps the name of a slot to the module that a model family puts into the slot.
        linears: maps a name in `LINEARS` to the module with which a model family replaces that linear layer.
        bidirectional: whether every position attends to all others; False for causal attention.
        fuses_norms: whether Transformer Engine's column-parallel layers compute the norms before them.
        number: the layer's number, counted from 0 over the whole model.
        stage: the part of the model that the layer is in; None for the whole model.
    """
    shape = model.layers[number]
    layers = range(model.num_layers) if stage is None else stage.layer_numbers
    backend = _backend(model)
    norm = backend.layer_norm(rms_norm=model.normalization == "RMSNorm") if uses_te(model) else Norm
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    own: dict[str, type | ModuleSpec] = dict(zip(LINEARS, (column, row, column, row), strict=True))
    if fuses_norms and not model.post_norm:
        own |= dict.fromkeys(LINEARS[::2], backend.column_parallel_layer_norm_linear())
    own |= linears
    own["linear_qkv"] = _of_heads(own["linear_qkv"], model.num_attention_heads, shape)
    attention = SelfAttentionSubmodules(
        linear_qkv=own["linear_qkv"],
        core_attention=_core_attention(model, number),
        linear_proj=_with_bias(own["linear_proj"]) if model.add_attention_output_bias else own["linear_proj"],
        q_layernorm=_head_norm(model, norm, model.num_attention_heads),
        k_layernorm=IdentityOp
        if shape.keys_of is not None
        else _head_norm(model, norm, shape.num_query_groups),
    )
    mlp = MLPSubmodules(
        linear_fc1=_with_bias(own["linear_fc1"]) if model.add_mlp_bias else own["linear_fc1"],
        linear_fc2=_with_bias(own["linear_fc2"]) if model.add_mlp_bias else own["linear_fc2"],
        activation_func=_gated_activation(model, shape.sparsity),
    )
    before = IdentityOp if model.post_norm else norm
    after = norm if model.sandwich_norm or model.post_norm else IdentityOp
    key_values = key_value_settings(model, number, layers)
    submodules = ExtendedLayerSubmodules(
        input_layernorm=before,
        self_attention=ModuleSpec(
            module=SelfAttention if key_values is None else ExtendedSelfAttention,
            params={"attn_mask_type": AttnMaskType.no_mask if bidirectional else AttnMaskType.causal}
            | ({} if key_values is None else {"key_values": key_values}),
            submodules=attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=before,
        mlp=_mlp(mlp),
        mlp_bda=get_bias_dropout_add,
        post_attention_layernorm=after,
        post_mlp_layernorm=after,
        **_parts_of_gemma3n(model),
        **slots,
    )
    params = {
        "auxiliary": auxiliary,
        "changes_outputs": model.changes_outputs,
        "residual_multiplier": model.residual_multiplier,
        "sizes": _sizes(shape),
        "has_scalar": model.layer_scalar,
        "sends_written": stage is not None and not stage.is_last and number == stage.layer_numbers[-1],
    }
    return ModuleSpec(module=ExtendedTransformerLayer, params=params, submodules=submodules)


def _sizes(shape: LayerShape) -> dict[str, int]:
    """Returns the fields of the engine's configuration in which layers may differ."""
    return {
        "ffn_hidden_size": shape.ffn_hidden_size,
        "kv_channels": shape.kv_channels,
        "num_query_groups": shape.num_query_groups,
    }


def key_value_settings(model: ModelConfig, number: int, layers: Sequence[int]) -> KeyValueSettings | None:
    """Returns the settings of a layer's `ExtendedSelfAttention`; None if the engine's own attention suffices.

    Args:
        model: configuration of the base model.
        number: the layer's number, counted from 0 over the whole model.
        layers: numbers of the layers of the same pipeline stage.
    """
    shapes = model.layers
    shape = shapes[number]
    source = shape.keys_of if shape.keys_of is not None else number
    is_shared = any(other.keys_of == source for other in shapes)
    if not is_shared and shape.window is None and not shape.values_are_keys and not model.v_layernorm:
        return None
    users = [layer for layer in layers if layer == source or shapes[layer].keys_of == source]
    return KeyValueSettings(
        values_are_keys=shape.values_are_keys,
        normalizes_values=model.v_layernorm,
        stream=shared_stream(source) if is_shared else None,
        reads_stream=shape.keys_of is not None,
        keeps_cache=number == users[0],
    )


def key_value_streams(model: ModelConfig, tensor_parallel_size: int) -> list[AuxiliaryStream]:
    """Returns the streams for keys and values that several layers use: [s, b, 2 g d] on each tensor-parallel rank."""
    sources = sorted({shape.keys_of for shape in model.layers if shape.keys_of is not None})
    return [
        AuxiliaryStream(
            name=shared_stream(source),
            width=2 * max(1, shape.num_query_groups // tensor_parallel_size) * shape.kv_channels,
            full_sequence=True,
            travels=True,
            written=True,
        )
        for source, shape in ((source, model.layers[source]) for source in sources)
    ]


def shared_stream(source: int) -> str:
    """Returns the name of the stream with the keys and values of layer `source`."""
    return f"keys_and_values_of_layer_{source}"


def block_spec(model: ModelConfig, layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """Returns the spec of one stage: its layers and, on the last stage, the final norm."""
    norm = _backend(model).layer_norm(rms_norm=model.normalization == "RMSNorm") if uses_te(model) else Norm
    if model.altup_streams is not None:
        norm = ModuleSpec(module=JoinStreams, params={"streams": model.altup_streams, "norm": norm})
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _parts_of_gemma3n(model: ModelConfig) -> dict[str, ModuleSpec]:
    found = {}
    if model.laurel_rank is not None:
        found["laurel"] = ModuleSpec(module=Laurel, params={"rank": model.laurel_rank})
    if model.altup_streams is not None:
        params = {"streams": model.altup_streams, "coef_clip": model.altup_coef_clip}
        found["altup"] = ModuleSpec(module=AltUp, params=params)
    return found


def _mlp(submodules: MLPSubmodules) -> ModuleSpec | Callable[..., MLP]:
    """Returns the MLP's entry in the spec of the engine's layer."""
    # Up to 0.17 the entry is a spec, from 0.18 on a function; with a spec, later versions log a message.
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def _gated_activation(model: ModelConfig, sparsity: float) -> type | ModuleSpec | None:
    if sparsity:
        params = {"sparsity": sparsity, "has_gelu": model.geglu}
        return ModuleSpec(module=SparseGatedActivation, params=params)
    if model.geglu:
        return GeGLU
    if not model.swiglu:
        return None
    return TESwiGLU if uses_te(model) else SwiGLU


def _with_bias(linear: type | ModuleSpec) -> type | ModuleSpec:
    """Returns the linear layer with its bias switched on."""
    # The engine has one switch for the biases of all linear layers except qkv; here, MLP and attention output may
    # differ.
    if isinstance(linear, ModuleSpec):
        return ModuleSpec(module=_biased(linear.module), params=linear.params)
    return _biased(linear)


def _of_heads(linear: type | ModuleSpec, queries: int, shape: LayerShape) -> type | ModuleSpec:
    """Returns the query-key-value projection without rows for keys or values that the layer does not compute; the
    engine's own always has both.
    """
    if shape.key_value_heads == 2 * shape.num_query_groups:
        return linear
    rows = (queries + shape.key_value_heads) * shape.kv_channels
    if isinstance(linear, ModuleSpec):
        return ModuleSpec(module=_with_rows(linear.module, rows), params=linear.params)
    return _with_rows(linear, rows)


@functools.cache
def _with_rows(linear: type, rows: int) -> type:
    class WithRows(linear):
        def __init__(self, input_size: int, output_size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(input_size, rows, *args, **kwargs)

    return WithRows


@functools.cache
def _biased(linear: type) -> type:
    # The result is cached, so that all layers share one class, because the engine compares module types.
    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return Biased


def _backend(model: ModelConfig) -> BackendSpecProvider:
    if not uses_te(model):
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _head_norm(model: ModelConfig, norm: type, heads: int) -> type | ModuleSpec:
    """Returns the norm of queries or keys, for `heads` heads per token."""
    if model.qk_projection_norm:
        return ModuleSpec(module=ProjectionNorm, params={"heads": heads})
    return norm if model.qk_layernorm else IdentityOp


def _core_attention(model: ModelConfig, number: int) -> Callable[..., Any]:
    if model.attention_backend == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    if model.attention_backend == "local":
        return LocalSpecProvider().core_attention()
    window, part = model.layers[number].window, rotary_part(model, number)
    has_own_base = model.rotary_base_local is not None and window is not None
    chosen: dict[str, Any] = {
        "window": window,
        "rotary_part": part,
        "rotary_scale": 1.0 if has_own_base else rotary_scale(model),
        "rotates": not model.without_rotary[number],
    }
    if chosen == {"window": None, "rotary_part": None, "rotary_scale": 1.0, "rotates": True}:
        return SDPAttention
    return functools.partial(SDPAttention, **chosen)
