"""Tiny models with PLE and NPT layers: each form and option once, saved as checkpoints with random weights."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.interface.family_interface import Family

TOKENIZER = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=95)
VOCAB = 96
EOD = 95
ROWS = 24

LLAMA = replace(TINY, num_layers=2, untie_embeddings_and_output_weights=True)
BASES: dict[str, ModelConfig] = {
    "Llama": LLAMA,
    "Llama with biases": replace(TINY, num_layers=2, disable_bias_linear=False),
    "Mistral": replace(LLAMA, window_size="5,0"),
    "Qwen2": replace(TINY, num_layers=2, add_qkv_bias=True, window_size="5,0", window_attn_skip_freq="[1,0]"),
    "Qwen3": replace(LLAMA, qk_layernorm=True),
    "Gemma3": replace(
        TINY,
        num_layers=2,
        swiglu=False,
        geglu=True,
        apply_layernorm_1p=True,
        sandwich_norm=True,
        qk_layernorm=True,
        embedding_multiplier=32**0.5,
        softmax_scale=16**-0.5,
        window_size="5,0",
        window_attn_skip_freq="[1,0]",
        rotary_base_local=100.0,
    ),
}

PER_LAYER = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_hidden_size=8,
    per_layer_vocab_size=ROWS,
    per_layer_embed_scale=0.7,
)
NPT = NPTModuleConfig(npt_layers="all", np_rank=4, np_scale=0.8)


@dataclass(frozen=True)
class Case:
    """A base model and what is added to it."""

    base: str = "Llama"
    per_layer: PerLayerConfig | None = None
    npt: NPTModuleConfig | None = None

    @property
    def model(self) -> ModelConfig:
        return BASES[self.base]

    def families(self) -> list[Family]:
        found: list[Family] = []
        if self.per_layer is not None:
            identity = self.per_layer.uses_token_ids
            table = None if identity else (torch.arange(VOCAB) * 7 + 1) % (ROWS - 7) + 7
            found.append(PerLayerFamily(self.per_layer, VOCAB, table))
        return [*found, NPTFamily(self.npt)] if self.npt is not None else found


def _per_layer(base: str = "Llama", **changes: Any) -> Case:
    return Case(base, per_layer=replace(PER_LAYER, **changes))


def _npt(base: str = "Llama", **changes: Any) -> Case:
    return Case(base, npt=replace(NPT, **changes))


def _identity(**changes: Any) -> PerLayerConfig:
    return replace(PER_LAYER, per_layer_vocab_size=None, **changes)


_POSITIONS, _METHODS = ("before_layer", "after_mlp"), ("scaled_add", "concat", "gated")
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swish")
_TARGETS = ("gate", "gate+up", "gate+up+down")


def _cases() -> dict[str, Case]:
    found = {
        f"PLE {position} {method} {activation}": _per_layer(
            per_layer_position=position,
            per_layer_combination_method=method,
            per_layer_gate_activation=activation,
        )
        for position in _POSITIONS
        for method in _METHODS
        for activation in _ACTIVATIONS
    }
    found |= {
        f"PLE {strategy}": _per_layer(per_layer_strategy=strategy)
        for strategy in ("semantic_focus", "random_subset", "attention_guidance")
    }
    found["PLE identity"] = Case(per_layer=_identity(per_layer_strategy="identity"))
    found["PLE gemma4"] = Case(per_layer=_identity(per_layer_preset="gemma4", per_layer_embed_scale=1.0))
    found |= {
        f"{base}, PLE {method}": _per_layer(base, per_layer_combination_method=method)
        for base, method in zip(
            list(BASES)[1:], ("gated", "concat", "scaled_add", "gated", "concat"), strict=True
        )
    }
    for residual in ("keep", "drop"):
        for target in _TARGETS:
            found[f"NPT low_rank {target} {residual}"] = _npt(np_target=target, np_residual=residual)
            found[f"NPT outer_product {target} {residual}"] = _npt(
                np_form="outer_product", np_target=target, np_residual=residual
            )
        for target in _TARGETS[1:]:
            found[f"NPT key_value {target} {residual}"] = _npt(
                np_form="key_value", np_target=target, np_residual=residual
            )
    outer = {"np_form": "outer_product", "np_target": "triple", "num_np_components": 3}
    found["NPT outer_product, components"] = _npt(**outer)
    found["NPT outer_product, not affine"] = _npt(**outer, np_affine=False)
    found["NPT outer_product, not normalized"] = _npt(**outer, np_normalize=False)
    found["NPT low_rank, components"] = _npt(np_target="dual", num_np_components=3)
    found["NPT upper half"] = _npt(npt_layers="upper_half", np_residual="keep")
    found["NPT, ranks of layers"] = _npt(np_rank="4/6,2", np_form="key_value", np_target="triple")
    for base in ("Llama with biases", "Mistral", "Qwen2", "Qwen3"):
        found[f"{base}, NPT"] = _npt(base, np_target="gate+up+down", np_residual="keep")
    found["PLE and NPT"] = replace(_npt(np_target="triple", npt_layers="1"), per_layer=PER_LAYER)
    return found


CASES = _cases()


def save_random(case: Case, save: str) -> None:
    """Saves a checkpoint whose parameters are all random, norms and layer scalars included."""
    run = open_run(case, CheckpointConfig(save=save))
    generator = torch.Generator().manual_seed(11)
    centered = case.model.apply_layernorm_1p
    with torch.no_grad():
        for name, tensor in [*run.chunks[0].named_parameters(), *run.chunks[0].named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            is_one = tensor.dim() == 1 and not name.endswith("bias")
            mean = 0.0 if centered and "layernorm" in name else float(is_one)
            tensor.copy_(mean + 0.2 * torch.randn(tensor.shape, generator=generator))
    run.save()


def open_run(case: Case, checkpoint: CheckpointConfig, parallel: ParallelConfig | None = None) -> TinyRun:
    """Builds a training run of a case, and loads the checkpoint that is named."""
    settings = RunSettings(
        parallel=parallel or ParallelConfig(),
        checkpoint=checkpoint,
        model=case.model,
        vocab_size=VOCAB,
        tokenizer=build_tokenizer(TOKENIZER).fingerprint(),
        tokenizer_config=TOKENIZER,
        make_families=case.families,
    )
    return TinyRun(settings)


_BLOCK = """
import sys
class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_ext", "megatron"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotHere())
"""


def run_without_us(script: str, *arguments: str, folder: Path) -> str:
    """Runs Python code in a new process that cannot import our package or the engine; returns what it prints."""
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", _BLOCK + script, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
