"""The base model's position embedding: its type, and the rotary frequencies with their scaling."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_fraction,
    check_positive,
    flag_name,
)

if TYPE_CHECKING:
    from megatron_ext.config.groups.model_config import ModelConfig

_ROPE_SCALING = (
    "use_rope_scaling",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class PositionFields:
    """Flags for the position embedding of the base GPT model."""

    max_position_embeddings: int | None = None
    """Largest number of positions. Default: the sequence length."""

    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """Position embedding: rotary, learned, or none."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_base_local: float | None = None
    """With --window-size: base of the rotary frequencies in layers with a window, which are then not scaled. Default:
    the frequencies of all other layers."""

    rotary_percent: float = 1.0
    """Fraction of each head's channels that are rotated, in (0, 1]."""

    rotary_proportion: float = 1.0
    """Fraction of each head's pairs of channels that are rotated, those with the highest frequencies, in (0, 1], as in
    Gemma 4. With --window-size, only in layers without a window."""

    rotary_seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this factor (linear scaling), for longer sequences than the model was trained on."""

    use_rope_scaling: bool = False
    """Scale rotary frequencies as Llama 3 does: divide low ones by a factor, keep high ones, blend those in between."""

    rope_scaling_factor: float = 8.0
    """Llama 3's rope scaling: the factor that low frequencies are divided by."""

    rope_low_freq_factor: float = 1.0
    """Llama 3's rope scaling: a frequency is low if its wavelength exceeds the original length divided by this."""

    rope_high_freq_factor: float = 4.0
    """Llama 3's rope scaling: a frequency is high if its wavelength is below the original length divided by this."""

    rope_original_max_position_embeddings: int = 8192
    """Llama 3's rope scaling: sequence length that the model was first trained with, in tokens (original length)."""


def require_default(config: object, name: str, needed: str) -> None:
    """Raises `ValueError` if a field is set that has no effect without `needed`."""
    value = getattr(config, name)
    if value != type(config).__dataclass_fields__[name].default:  # type: ignore[attr-defined]
        shown = "" if value is True else f" {value}"
        raise ValueError(f"{flag_name(name)}{shown}: has no effect; it requires {needed}")


def check_positions(model: "ModelConfig") -> None:
    """Checks the position embedding.

    Raises:
        ValueError: a flag has an impossible value, or has no effect.
    """
    check_at_least(model, 1, "rotary_base", "rotary_base_local")
    check_positive(model, "rotary_percent", "rotary_proportion")
    check_fraction(model, "rotary_percent", "rotary_proportion", closed=True)
    _check_rotary(model)
    _check_scaling(model)
    if model.max_position_embeddings is not None and model.max_position_embeddings < model.seq_length:
        raise ValueError(
            f"--max-position-embeddings {model.max_position_embeddings}: must be at least --seq-length "
            f"{model.seq_length}"
        )


def _check_rotary(model: "ModelConfig") -> None:
    """Rejects rotary settings that would have no effect, and an odd number of rotated channels."""
    if model.position_embedding_type != "rope":
        for name in (
            "rotary_base",
            "rotary_base_local",
            "rotary_percent",
            "rotary_proportion",
            "rotary_seq_len_interpolation_factor",
            *_ROPE_SCALING,
        ):
            require_default(
                model, name, f"--position-embedding-type rope (got {model.position_embedding_type})"
            )
        return
    if model.window_size is None:
        require_default(model, "rotary_base_local", "--window-size")
    if not model.use_rope_scaling:
        for name in _ROPE_SCALING[1:]:
            require_default(model, name, "--use-rope-scaling")
    channels = model.resolved_kv_channels
    rotated = int(channels * model.rotary_percent)
    if rotated % 2 or not rotated:
        sizes = f"--hidden-size {model.hidden_size}, --num-attention-heads {model.num_attention_heads}"
        given = sizes if model.kv_channels is None else f"--kv-channels {channels}"
        raise ValueError(
            f"{given}: a head has {channels} channels, of which --rotary-percent {model.rotary_percent} "
            f"rotates {rotated}; this number must be even"
            f"{'' if rotated else ' and above 0'}"
        )


def _check_scaling(model: "ModelConfig") -> None:
    names = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
    check_positive(model, *names)
    check_at_least(model, 1e-6, "rotary_seq_len_interpolation_factor")  # frequencies must stay finite
    check_at_least(model, 1, "rope_original_max_position_embeddings")
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise ValueError(
            f"--rope-high-freq-factor {model.rope_high_freq_factor}: must be above "
            f"--rope-low-freq-factor {model.rope_low_freq_factor}"
        )
    factor = model.rotary_seq_len_interpolation_factor
    if factor is not None and model.use_rope_scaling:
        raise ValueError(
            f"--rotary-seq-len-interpolation-factor {factor}: cannot be given together with --use-rope-scaling"
        )
