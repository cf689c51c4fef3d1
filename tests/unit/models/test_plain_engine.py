"""With every slot empty the model is a plain megatron-core GPTModel of the same attention and norm, to the bit."""

from dataclasses import replace

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel as EngineGPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model, padded_vocab_size
from megatron_ext.models.engine_config import build_transformer_config
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.norm import Norm
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE

GPT2 = replace(
    TINY,
    swiglu=False,
    disable_bias_linear=False,
    normalization="LayerNorm",
    position_embedding_type="learned_absolute",
    num_query_groups=None,
)
MODELS = {
    "rope, tied": TINY,
    "rope, untied": replace(TINY, untie_embeddings_and_output_weights=True),
    "learned positions, tied": replace(TINY, position_embedding_type="learned_absolute"),
    "learned positions, untied": replace(
        TINY, position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=True
    ),
    "GPT-2's": GPT2,
    "norm on queries and keys": replace(GPT2, qk_layernorm=True),
    "megatron-core's local attention": replace(TINY, attention_backend="local"),
}


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, bool], dict[str, float]]:
    """Largest differences between both models, by model and precision."""
    return run_single(_compare_all)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bit_equal_to_a_plain_engine_model(
    name: str, bf16: bool, compared: dict[tuple[str, bool], dict[str, float]]
) -> None:
    assert compared[name, bf16]["logits"] == 0.0


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_a_plain_engine_model(
    name: str, bf16: bool, compared: dict[tuple[str, bool], dict[str, float]]
) -> None:
    assert compared[name, bf16]["loss"] < 1e-6
    assert compared[name, bf16]["gradients"] < (3e-2 if bf16 else 1e-5)


def _compare_all() -> dict[tuple[str, bool], dict[str, float]]:
    initialize(ParallelConfig(), seed=1)
    return {(name, bf16): _compare(MODELS[name], bf16) for name in MODELS for bf16 in (False, True)}


def _compare(model: ModelConfig, bf16: bool) -> dict[str, float]:
    ours = build_model(
        model, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, precision="bf16" if bf16 else "fp32"
    )[0]
    plain = _plain_model(model, bf16)
    if bf16:
        plain.bfloat16()  # what the engine's own bf16 wrapper does
    plain.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB_SIZE, (3, model.seq_length), generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (3, model.seq_length), generator=generator)
    positions = torch.arange(model.seq_length).expand_as(tokens)
    with torch.no_grad():
        logits = [m(tokens, positions, None) for m in (ours, plain)]
    losses = [m(tokens, positions, None, labels=labels).mean() for m in (ours, plain)]
    for loss in losses:
        loss.backward()
    gradients = zip(ours.named_parameters(), plain.named_parameters(), strict=True)
    return {
        "logits": float((logits[0].float() - logits[1].float()).abs().max()),
        "loss": abs(float(losses[0].detach()) / float(losses[1].detach()) - 1),
        "gradients": max(_difference(name, a, other, b) for (name, a), (other, b) in gradients),
    }


def _difference(name: str, ours: torch.nn.Parameter, other: str, plain: torch.nn.Parameter) -> float:
    """Relative L2 difference of one parameter's gradients."""
    assert name == other and ours.grad is not None and plain.grad is not None
    # A bias of the keys' norm shifts all scores of a query alike: its gradient is zero but for rounding.
    norm = torch.linalg.norm(plain.grad.double()).clamp(min=1e-3)
    return float(torch.linalg.norm(ours.grad.double() - plain.grad.double()) / norm)


def _plain_model(model: ModelConfig, bf16: bool) -> EngineGPTModel:
    """Nothing of ours but attention, norm and the engine's configuration."""
    config = build_transformer_config(model, ParallelConfig(), precision="bf16" if bf16 else "fp32")
    config.use_te_activation_func = False
    local = model.attention_backend == "local"
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=LocalSpecProvider().core_attention() if local else SDPAttention,
        linear_proj=RowParallelLinear,
        **({"q_layernorm": Norm, "k_layernorm": Norm} if model.qk_layernorm else {}),
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    layers = [ModuleSpec(module=TransformerLayer, submodules=layer) for _ in range(model.num_layers)]
    return EngineGPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
        vocab_size=padded_vocab_size(VOCAB_SIZE, model, 1),
        max_sequence_length=model.resolved_max_position_embeddings,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
    )
