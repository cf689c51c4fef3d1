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
from megatron_ext.interop.formats.configs.hf_config import choose_architecture, to_model_config
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.interface.family_interface import Family
from tests.unit.interop.hf_models import KINDS, SIZES

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

OTHERS = ("Phi3", "Olmo2", "Olmo3", "SmolLM3", "Granite")
"""Bases of other architectures, as transformers describes them."""


def _imported(name: str) -> ModelConfig:
    kind = KINDS[name]
    config = kind.config_class(**{**SIZES, **kind.changes}).to_dict()
    return replace(to_model_config(config, "config.json").model, attention_dropout=0.0)


BASES |= {name: _imported(name) for name in OTHERS}

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

    @property
    def architecture(self) -> str:
        """Class of the base model in transformers."""
        return choose_architecture(self.model, f"{self.base}ForCausalLM" if self.base in OTHERS else None)

    def families(self) -> list[Family]:
        found: list[Family] = []
        if self.per_layer is not None:
            needs_table = self.per_layer.needs_table
            table = None if not needs_table else (torch.arange(VOCAB) * 7 + 1) % (ROWS - 7) + 7
            found.append(PerLayerFamily(self.per_layer, VOCAB, table, eod=EOD))
        return [*found, NPTFamily(self.npt)] if self.npt is not None else found


def _per_layer(base: str = "Llama", **changes: Any) -> Case:
    return Case(base, per_layer=replace(PER_LAYER, **changes))


def _npt(base: str = "Llama", **changes: Any) -> Case:
    return Case(base, npt=replace(NPT, **changes))


def _identity(**changes: Any) -> PerLayerConfig:
    return replace(PER_LAYER, per_layer_vocab_size=None, **changes)


def _choice(method: str, activation: str, **changes: Any) -> dict[str, Any]:
    return {"per_layer_combination_method": method, "per_layer_gate_activation": activation, **changes}


_AFTER: dict[str, Any] = {"per_layer_position": "after_mlp"}
_OUTER: dict[str, Any] = {"np_form": "outer_product", "np_target": "triple"}
_KEY_VALUE: dict[str, Any] = {"np_form": "key_value", "np_target": "gate+up"}
_KEEP: dict[str, Any] = {"np_residual": "keep"}

CASES = {
    "PLE scaled_add": _per_layer(**_choice("scaled_add", "relu")),
    "PLE concat": _per_layer(
        "Llama with biases", **_choice("concat", "gelu", per_layer_strategy="semantic_focus")
    ),
    "PLE gated": _per_layer("Mistral", **_choice("gated", "gelu_tanh", per_layer_strategy="random_subset")),
    "PLE attention_guidance": _per_layer(
        "Qwen2", **_AFTER, **_choice("scaled_add", "silu", per_layer_strategy="attention_guidance")
    ),
    "PLE concat after": _per_layer("Qwen3", **_AFTER, **_choice("concat", "swish")),
    "PLE gated after, identity": Case(
        "Gemma3", per_layer=_identity(**_AFTER, **_choice("gated", "silu", per_layer_strategy="identity"))
    ),
    "PLE gemma4": Case("Gemma3", per_layer=_identity(per_layer_preset="gemma4", per_layer_embed_scale=1.0)),
    "PLE bigram_hash": _per_layer("Mistral", per_layer_strategy="bigram_hash", per_layer_hashes=1),
    "PLE trigram_hash": _per_layer(
        "Gemma3", **_AFTER, **_choice("gated", "silu", per_layer_strategy="trigram_hash")
    ),
    "NPT low_rank, components": _npt(num_np_components=3, **_KEEP),
    "NPT low_rank triple": _npt("Qwen3", np_target="triple"),
    "NPT outer_product dual": _npt("Mistral", np_form="outer_product", np_target="dual", **_KEEP),
    "NPT outer_product, components": _npt("Llama with biases", num_np_components=3, **_OUTER),
    "NPT outer_product, not affine": _npt(np_affine=False, **_OUTER),
    "NPT outer_product, not normalized": _npt(np_normalize=False, **_OUTER, **_KEEP),
    "NPT key_value": _npt("Qwen2", **_KEY_VALUE, **_KEEP),
    "NPT key_value triple, ranks of layers": _npt(np_rank="4/6,2", np_form="key_value", np_target="triple"),
    "PLE and NPT": replace(_npt(np_target="triple", npt_layers="upper_half"), per_layer=PER_LAYER),
}
"""Each value of each setting at least once, on every base."""


def all_forms() -> dict[str, Case]:
    """Returns every combination of methods, positions and activations of PLE, and of forms and targets of NPT."""
    found = {
        f"PLE {position} {method} {activation}": _per_layer(
            **_choice(method, activation, per_layer_position=position)
        )
        for position in ("before_layer", "after_mlp")
        for method in ("scaled_add", "concat", "gated")
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "swish")
    }
    for residual in ("keep", "drop"):
        for target in ("gate", "gate+up", "gate+up+down"):
            common: dict[str, Any] = {"np_residual": residual, "np_target": target}
            if target != "gate":
                found[f"NPT key_value {target} {residual}"] = _npt(np_form="key_value", **common)
            for count in (1, 3):
                name = f"{target} {residual} {count}"
                found[f"NPT low_rank {name}"] = _npt(num_np_components=count, **common)
                outer = {**common, "num_np_components": count, "np_form": "outer_product"}
                found |= {
                    f"NPT outer_product {name} affine={affine} normalize={normalize}": _npt(
                        np_affine=affine, np_normalize=normalize, **outer
                    )
                    for affine in (True, False)
                    for normalize in (True, False)
                }
    found |= {f"PLE on {base}": _per_layer(base, per_layer_combination_method="gated") for base in OTHERS}
    # NPT refuses norms and factors of the MLP's output.
    return found | {f"NPT on {base}": _npt(base, np_target="triple") for base in ("Phi3", "SmolLM3")}


def save_random(case: Case, save: str) -> None:
    """Saves a checkpoint whose parameters are all random, norms and layer scalars included."""
    run = open_run(case, CheckpointConfig(save=save))
    randomize(run.chunks[0], case)
    run.save()


@torch.no_grad()
def randomize(chunk: torch.nn.Module, case: Case) -> None:
    """Sets all parameters and layer scalars of a model to random values."""
    generator = torch.Generator().manual_seed(11)
    centered = case.model.apply_layernorm_1p
    for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        is_one = tensor.dim() == 1 and not name.endswith("bias")
        mean = 0.0 if centered and "layernorm" in name else float(is_one)
        tensor.copy_(mean + 0.2 * torch.randn(tensor.shape, generator=generator))


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
