"""The models that these tests train with Transformer Engine and without: two base models and the three families."""

from dataclasses import replace

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import Variant
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family
from tests.unit.progressive.progressive_helpers import DUAL, MakeAdapted

LLAMA = replace(TINY, init_method_std=0.1)
GPT2 = replace(LLAMA, normalization="LayerNorm", swiglu=False, disable_bias_linear=False, add_qkv_bias=True)
PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=24, per_layer_hidden_size=8)
NPT = NPTModuleConfig(
    npt_layers="upper_half",
    np_form="outer_product",
    np_target="gate+up+down",
    np_rank=8,
    np_init_scale=0.05,
    freeze_base=False,
)


def _per_layer() -> list[Family]:
    return [PerLayerFamily(PLE, VOCAB_SIZE, [token % 24 for token in range(VOCAB_SIZE)])]


def _npt() -> list[Family]:
    return [NPTFamily(NPT)]


VARIANTS = {
    "Llama": Variant(model=LLAMA),
    "GPT-2": Variant(model=GPT2),
    "PLE": Variant(make_families=_per_layer, model=LLAMA),
    "NPT": Variant(make_families=_npt, model=LLAMA),
    "LoRA": Variant(make_families=MakeAdapted(dict.fromkeys(range(2, 4), DUAL)), model=LLAMA),
}


def with_te(model: ModelConfig) -> ModelConfig:
    """Returns the model with Transformer Engine's linear layers and norms."""
    return replace(model, transformer_impl="transformer_engine")
