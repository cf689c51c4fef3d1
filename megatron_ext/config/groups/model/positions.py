"""The base model's position embedding: its type, and the rotary frequencies with their scaling."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_fraction,
    check_positive,
    flag,
    flag_name,
)
from megatron_ext.config.command_line.layer_windows import layers_without_rotary

if TYPE_CHECKING:
    from megatron_ext.config.groups.model_config import ModelConfig

_BLENDED = {
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
}
_FIELDS_OF_TYPE = {
    "llama3": _BLENDED,
    "yarn": {*_BLENDED, "rope_attention_factor"},
    "dynamic": {"rope_scaling_factor", "rope_original_max_position_embeddings"},
    "longrope": {
        "rope_scaling_factor",
        "rope_original_max_position_embeddings",
        "rope_attention_factor",
        "rope_short_factors",
        "rope_long_factors",
    },
}
"""For each --rope-scaling-type, the fields that have an effect."""

ROPE_SCALING = (
    "rope_scaling_type",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
    "rope_attention_factor",
    "rope_short_factors",
    "rope_long_factors",
)
"""The fields that have an effect only with --use-rope-scaling."""


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
    the frequencies of all other layers.
    """

    rotary_percent: float = 1.0
    """Fraction of each head's channels that are rotated, in (0, 1]."""

    rotary_proportion: float = 1.0
    """Fraction, in (0, 1], of each head's pairs of channels that are rotated; these have the highest frequencies, as
    in Gemma 4. With --window-size, it applies only to layers without a window.
    """

    rotary_seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this factor (linear scaling), for longer sequences than the model was trained on."""

    no_rope_freq: Annotated[str | None, flag(metavar="N | LIST")] = None
    """Layers without rotary positions, as in Megatron-LM: every Nth layer, or a list with a 1 for each layer without
    and a 0 for each layer with them, such as ([0]*3+[1])*2. Default: no layer.
    """

    use_rope_scaling: bool = False
    """Scale rotary frequencies, for longer sequences than the model was first trained on; see --rope-scaling-type."""

    rope_scaling_type: Literal["llama3", "yarn", "dynamic", "longrope"] = "llama3"
    """With --use-rope-scaling: the method. llama3 divides low frequencies by a factor, keeps high ones and blends
    those in between. yarn does the same with another blend and larger attention scores. dynamic (NTK) lets the base
    grow with the sequence beyond the original length. longrope has one list of divisors for sequences up to the
    original length and one for longer sequences.
    """

    rope_scaling_factor: float = 8.0
    """Rope scaling: divisor of low frequencies (llama3, yarn), or how fast the base grows (dynamic). For longrope,
    only the default of --rope-attention-factor depends on this value.
    """

    rope_low_freq_factor: float = 1.0
    """Rope scaling llama3, yarn: a frequency is low if its wavelength exceeds the original length / this value."""

    rope_high_freq_factor: float = 4.0
    """Rope scaling llama3, yarn: a frequency is high if its wavelength is below the original length divided by this
    value, which is 32 in most models with yarn.
    """

    rope_original_max_position_embeddings: int = 8192
    """Rope scaling: sequence length that the model was first trained with, in tokens (original length)."""

    rope_attention_factor: float | None = None
    """Rope scaling yarn, longrope: factor of the rotated queries and keys. Default, with the scaling factor F and the
    original length L: 0.1 ln F + 1 (yarn), sqrt(1 + ln F / ln L) (longrope); 1 for F up to 1.
    """

    rope_short_factors: tuple[float, ...] = ()
    """Rope scaling longrope: divisor of each frequency, in sequences up to the original length."""

    rope_long_factors: tuple[float, ...] = ()
    """Rope scaling longrope: divisor of each frequency, in longer sequences."""


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
            "no_rope_freq",
            "use_rope_scaling",
            *ROPE_SCALING,
        ):
            require_default(
                model, name, f"--position-embedding-type rope (got {model.position_embedding_type})"
            )
        return
    if model.window_size is None:
        require_default(model, "rotary_base_local", "--window-size")
    layers_without_rotary(model.no_rope_freq, model.num_layers)
    for name in ROPE_SCALING:
        if not model.use_rope_scaling:
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
    names = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_attention_factor")
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
    if model.use_rope_scaling and model.rope_scaling_type != "llama3":
        _check_scaling_type(model)


def _check_scaling_type(model: "ModelConfig") -> None:
    kind = model.rope_scaling_type
    chosen = f"--rope-scaling-type {kind}"
    for name in (name for name in ROPE_SCALING[1:] if name not in _FIELDS_OF_TYPE[kind]):
        require_default(model, name, f"another --rope-scaling-type (got {kind})")
    if model.attention_backend != "sdpa":
        raise ValueError(f"{chosen}: requires --attention-backend sdpa (got {model.attention_backend})")
    if kind == "yarn" and model.rotary_base <= 1:
        raise ValueError(f"--rotary-base {model.rotary_base}: must be above 1 with {chosen}")
    if kind in ("dynamic", "longrope"):
        require_default(model, "rotary_proportion", f"another --rope-scaling-type (got {kind})")
    if kind == "dynamic" and model.window_size is not None:
        raise ValueError(f"{chosen}: cannot be given together with --window-size {model.window_size}")
    if kind == "dynamic" and int(model.resolved_kv_channels * model.rotary_percent) == 2:
        raise ValueError(f"{chosen}: requires more than 2 rotated channels in a head (got 2)")
    if kind == "longrope":
        _check_longrope(model)


def _check_longrope(model: "ModelConfig") -> None:
    check_at_least(model, 2, "rope_original_max_position_embeddings")
    pairs = int(model.resolved_kv_channels * model.rotary_percent) // 2
    for name in ("rope_short_factors", "rope_long_factors"):
        factors = getattr(model, name)
        if len(factors) != pairs or min(factors) <= 0:
            raise ValueError(
                f"{flag_name(name)}: must be {pairs} numbers above 0, one for each pair of rotated "
                "channels of a head "
                f"(got {len(factors)}{f', the smallest {min(factors)}' if factors else ''})"
            )
    for name in ("rotary_base_local", "kv_channels_full"):
        require_default(model, name, "another --rope-scaling-type (got longrope)")
