"""Defaults of transformers' configuration classes, for fields that a config.json leaves out."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The defaults of one `model_type`."""

    positions: int
    """`max_position_embeddings`."""

    key_value_heads: int | None = None
    """`num_key_value_heads`; None for the number of attention heads."""

    head_size: int | None = None
    """`head_dim`; None for `hidden_size` / `num_attention_heads`."""

    norm_epsilon: float = 1e-6
    """`rms_norm_eps`."""

    rotary_base: float = 10000.0
    """`rope_theta`."""

    is_tied: bool = False
    """`tie_word_embeddings`."""

    pad_token: int | None = None
    """`pad_token_id`."""

    eos_token: int | None = None
    """`eos_token_id`."""


_GEMMA = Defaults(
    positions=131072,
    key_value_heads=4,
    head_size=256,
    rotary_base=1e6,
    is_tied=True,
    pad_token=0,
    eos_token=1,
)

DEFAULTS = {
    "llama": Defaults(positions=2048, eos_token=2),
    "mistral": Defaults(positions=131072, key_value_heads=8, eos_token=2),
    "qwen2": Defaults(positions=32768, key_value_heads=32),
    "qwen3": Defaults(positions=32768, key_value_heads=32, head_size=128),
    "gemma3_text": _GEMMA,
    "gemma4_text": _GEMMA,
    "gemma3n_text": replace(_GEMMA, positions=32768, key_value_heads=2),
    "phi3": Defaults(positions=4096, norm_epsilon=1e-5, pad_token=32000, eos_token=32000),
    "olmo2": Defaults(positions=2048, norm_epsilon=1e-5, pad_token=1, eos_token=50279),
    "olmo3": Defaults(positions=2048, norm_epsilon=1e-5, rotary_base=5e5, pad_token=1, eos_token=50279),
    "smollm3": Defaults(
        positions=32768,
        key_value_heads=4,
        rotary_base=2e6,
        is_tied=True,
        pad_token=128004,
        eos_token=128001,
    ),
    "granite": Defaults(positions=2048, eos_token=2),
}
"""The defaults by `model_type`."""
