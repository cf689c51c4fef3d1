"""The layer spec: which module fills which slot of a layer.

Attention and linear layers come from megatron-core (its own, or Transformer Engine's on a GPU that has it); norm and
core attention are ours by default. The MLP's norm is a module of its own in every variant: families read its output.
"""

import functools
import importlib.util
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.norm import Norm
from megatron_ext.models.ops.swiglu import SwiGLU
from megatron_ext.models.transformer_layer import ExtendedLayerSubmodules, ExtendedTransformerLayer
from megatron_ext.platform.process_groups import use_cuda

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear modules of a layer: column-parallel, row-parallel, column-parallel, row-parallel."""


def layer_spec(
    model: ModelConfig,
    auxiliary: AuxiliaryInputs,
    slots: dict[str, ModuleSpec],
    linears: dict[str, ModuleSpec],
    bidirectional: bool = False,
) -> ModuleSpec:
    """Spec of one layer.

    Args:
        model: the base model; chooses attention, norm and linear implementations.
        auxiliary: layout of the auxiliary streams.
        slots: slot name -> module, from the families.
        linears: name in `LINEARS` -> module in its place, from the families.
        bidirectional: every position attends to all others.

    Raises:
        ValueError: Transformer Engine is asked for and not installed.
    """
    backend = _backend(model)
    norm = backend.layer_norm(rms_norm=model.normalization == "RMSNorm") if _uses_te(model) else Norm
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    own: dict[str, type | ModuleSpec] = dict(zip(LINEARS, (column, row, column, row), strict=True))
    own |= linears
    attention = SelfAttentionSubmodules(
        linear_qkv=own["linear_qkv"],
        core_attention=_core_attention(model),
        linear_proj=_with_bias(own["linear_proj"]) if model.add_attention_output_bias else own["linear_proj"],
        q_layernorm=norm if model.qk_layernorm else IdentityOp,
        k_layernorm=norm if model.qk_layernorm else IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=_with_bias(own["linear_fc1"]) if model.add_mlp_bias else own["linear_fc1"],
        linear_fc2=_with_bias(own["linear_fc2"]) if model.add_mlp_bias else own["linear_fc2"],
        activation_func=SwiGLU if model.swiglu else None,
    )
    submodules = ExtendedLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.no_mask if bidirectional else AttnMaskType.causal},
            submodules=attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        **slots,
    )
    return ModuleSpec(module=ExtendedTransformerLayer, params={"auxiliary": auxiliary}, submodules=submodules)


def block_spec(model: ModelConfig, layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """Spec of one stage: its layers and, on the last stage, the final norm."""
    norm = _backend(model).layer_norm(rms_norm=model.normalization == "RMSNorm") if _uses_te(model) else Norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _with_bias(linear: type | ModuleSpec) -> type | ModuleSpec:
    """The linear layer with a bias: the engine's configuration has one switch for all but the qkv projection."""
    if isinstance(linear, ModuleSpec):
        return ModuleSpec(module=_biased(linear.module), params=linear.params)
    return _biased(linear)


@functools.cache
def _biased(linear: type) -> type:
    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return Biased


def _uses_te(model: ModelConfig) -> bool:
    if model.transformer_impl == "auto":
        return use_cuda() and importlib.util.find_spec("transformer_engine") is not None
    return model.transformer_impl == "transformer_engine"


def _backend(model: ModelConfig) -> BackendSpecProvider:
    if not _uses_te(model):
        return LocalSpecProvider()
    _require_te(f"--transformer-impl {model.transformer_impl}")
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _core_attention(model: ModelConfig) -> type:
    if model.attention_backend == "te":
        _require_te("--attention-backend te")
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SDPAttention if model.attention_backend == "sdpa" else LocalSpecProvider().core_attention()


def _require_te(asked_by: str) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(f"{asked_by}: Transformer Engine is not installed (pip install 'megatron-ext[te]')")
    if not use_cuda():
        raise ValueError(f"{asked_by}: Transformer Engine needs a CUDA device, and there is none here")
