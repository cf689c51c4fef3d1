"""Tiny Hugging Face models of the Llama family with random weights; calls in a process of their own."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.run_single import clean_process
from megatron_ext.training.interface.family_interface import Family

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
LENGTH = 48
GEMMA = ("Gemma3", "Gemma4", "Gemma3n")
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 10,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    "final_logit_softcapping": 4.0,
    "pad_token_id": None,
}
"""E2B in small: 6 layers, of which the last 3 use keys and values of layers 1 and 2."""

GEMMA3N = {
    "intermediate_size": [96, 96, 64, 64],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 12,
    "sliding_window": 10,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 90,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.7, 0.5, 0.0, 0.3],
    "laurel_rank": 6,
    "pad_token_id": None,
}
"""E2B in small: the last 2 of 4 layers use the keys and values of the first 2 and have narrower MLPs."""


@dataclass(frozen=True)
class Kind:
    """An architecture and how its configuration differs from `SIZES`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> Any:
        """transformers' configuration class."""
        return getattr(transformers, f"{self.name}{'TextConfig' if self.name in GEMMA else 'Config'}")

    def build(self) -> Any:
        """The model, every parameter random, norms and biases included."""
        config_class = self.config_class
        torch.manual_seed(1)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config_class(**{**SIZES, **self.changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Gemma 3 stores the weights of its norms less 1.
                parameter.normal_(0.0, 0.15).add_(1.0 if "norm" in name and self.name != "Gemma3" else 0.0)
                self.adapt(name, parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.uniform_(0.5, 1.5)
        return model.eval()

    def adapt(self, name: str, parameter: torch.Tensor) -> None:
        """Changes random values of N(0, 0.15) with which the model would round too much."""
        if "q_norm" in name and self.name == "Gemma4":  # its attention has no other scale
            parameter.mul_(0.15)
        if self.name == "Gemma3n" and "norm" not in name:
            parameter.mul_(3.0 if "modality_router" in name else 0.33)
            parameter.add_(1.0 if "correct_output_scale" in name else 0.0)


KINDS = {
    "Llama": Kind("Llama", {"num_key_value_heads": 4}),
    "Llama, grouped queries": Kind("Llama", {"head_dim": 16}),
    "Llama 3 scaling": Kind("Llama", {"rope_parameters": LLAMA3_SCALING}),
    "Llama, linear scaling": Kind(
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}
    ),
    "Llama, attention bias": Kind("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "Llama, MLP bias": Kind("Llama", {"mlp_bias": True}),
    "Llama, all biases": Kind("Llama", {"mlp_bias": True, "attention_bias": True, "vocab_size": 97}),
    "Mistral": Kind("Mistral", {"sliding_window": None, "head_dim": 8}),
    "Mistral, sliding window": Kind("Mistral", {"sliding_window": 16, "head_dim": 8}),
    "Qwen2": Kind("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, sliding windows": Kind(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}
    ),
    "Qwen3": Kind("Qwen3", {"head_dim": 12}),
    "Qwen3, attention bias": Kind("Qwen3", {"head_dim": 12, "attention_bias": True}),
    # A padding id would keep transformers from training its row of the embedding.
    "Gemma3": Kind(
        "Gemma3",
        {
            "head_dim": 12,
            "sliding_window": 10,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "Gemma3, scaled and limited": Kind(
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 2.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "Gemma3, no windows": Kind(
        "Gemma3", {"head_dim": 8, "layer_types": ["full_attention"] * 4, "pad_token_id": None}
    ),
    "Gemma4": Kind("Gemma4", {**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}),
    "Gemma4, keys are values": Kind(
        "Gemma4",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 5000.0,
                    "factor": 2.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "Gemma3n": Kind("Gemma3n", GEMMA3N),
    "Gemma3n, three streams, biases": Kind(
        "Gemma3n",
        {
            **GEMMA3N,
            "intermediate_size": 96,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": None,
            "altup_num_inputs": 3,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "Gemma4, no per-layer embedding": Kind(
        "Gemma4",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": None,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": False,
        },
    ),
    "Phi3": Kind("Phi3", {"sliding_window": 10, "pad_token_id": None}),
    # Some channels are rotated; beyond 20 tokens by other frequencies.
    "Phi3, longrope": Kind(
        "Phi3",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5000.0,
                "short_factor": [1.0, 1.1, 1.3, 2.0],
                "long_factor": [1.5, 3.0, 6.0, 9.0],
            },
            "original_max_position_embeddings": 20,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "Olmo2": Kind("Olmo2", {"pad_token_id": None}),
    "Olmo2, attention bias, yarn": Kind(
        "Olmo2",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
            "pad_token_id": None,
        },
    ),
    "Olmo3": Kind("Olmo3", {"sliding_window": 10, "rope_scaling": YARN, "pad_token_id": None}),
    "SmolLM3": Kind(
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 10,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "SmolLM3, biases": Kind(
        "SmolLM3",
        {"attention_bias": True, "mlp_bias": True, "pad_token_id": None},
    ),
    "Granite": Kind(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.25,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "Llama, yarn": Kind("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    # Beyond 32 tokens, every length has frequencies of its own.
    "Llama, dynamic": Kind(
        "Llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
}


def tokens() -> torch.Tensor:
    """[2, LENGTH] token ids."""
    return torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """[2, LENGTH, V] of a transformers model."""
    result: torch.Tensor = model(tokens()).logits
    return result


def families_of(configurations: dict[str, Any]) -> list[Family]:
    """The model families that a checkpoint or an import describes."""
    return [FAMILIES[name].from_configuration(stored) for name, stored in configurations.items()]


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that starts and ends a process group of its own; what it prints is dropped."""
    with clean_process(), contextlib.redirect_stdout(None):
        return function(*args)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
