"""Tiny Hugging Face models of the Llama family with random weights; calls in a process of their own."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_ext.testing.run_single import clean_process

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


@dataclass(frozen=True)
class Kind:
    """An architecture and how its configuration differs from `SIZES`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> Any:
        """transformers' configuration class."""
        return getattr(transformers, f"{self.name}{'TextConfig' if self.name == 'Gemma3' else 'Config'}")

    def build(self) -> Any:
        """The model, every parameter random, norms and biases included."""
        config_class = self.config_class
        torch.manual_seed(1)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config_class(**{**SIZES, **self.changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Gemma stores the weights of its norms less 1.
                parameter.normal_(0.0, 0.15).add_(1.0 if "norm" in name and self.name != "Gemma3" else 0.0)
        return model.eval()


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


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that starts and ends a process group of its own; what it prints is dropped."""
    with clean_process(), contextlib.redirect_stdout(None):
        return function(*args)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
