"""Sizes of each layer: sliding window, MLP width, number and width of heads, and the layer that supplies its keys.

`--ffn-hidden-sizes` is a list of one width per layer, such as [6144]*15+[12288]*20. Flags that end in `-full` are for
layers without a sliding window in a model whose other layers have one, as in Gemma 4. With `--num-kv-shared-layers N`
each of the last N layers uses the keys and values of an earlier layer: the last one, before these N, that is of the
same kind (with a window, or without).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from megatron_ext.config.command_line.field_checks import check_at_least, flag, flag_name
from megatron_ext.config.command_line.layer_windows import entries_of, window_tokens, windowed_layers
from megatron_ext.config.groups.model.parts_of_gemma3n import sparsities
from megatron_ext.config.groups.model.positions import require_default

if TYPE_CHECKING:
    from megatron_ext.config.groups.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerFields:
    """Flags for sizes and parts that may differ from layer to layer."""

    ffn_hidden_sizes: Annotated[str | None, flag(metavar="LIST")] = None
    """Width of the MLP of every layer, as a list such as [6144]*15+[12288]*20. Default: the same in all layers."""

    num_query_groups_full: int | None = None
    """With --window-size: number of key/value heads in layers without a window. Default: as in all other layers."""

    kv_channels_full: int | None = None
    """With --window-size: width of one attention head in layers without a window. Default: as in all other layers."""

    num_kv_shared_layers: int = 0
    """Number of layers at the end of the model that compute no keys and values. Each uses those of the last earlier
    layer that computes them and is of the same kind, with or without a sliding window.
    """

    attention_k_eq_v: bool = False
    """In layers without a sliding window, use the keys, before their norm and rotation, also as values."""

    v_layernorm: bool = False
    """Divide the values of each attention head by their root mean square."""

    layer_scalar: bool = False
    """Multiply the output of every layer by a number that is never trained, as in Gemma 4: 1, or the imported number.
    --per-layer-preset gemma4 implies this flag.
    """


LAYER_DIFFERENCES = (
    "ffn_hidden_sizes",
    "num_query_groups_full",
    "kv_channels_full",
    "attention_k_eq_v",
    "num_kv_shared_layers",
)
"""Fields of `ModelConfig` that give layers tensors of different shapes."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one layer."""

    window: int | None
    """Number of tokens that a token attends to, including itself; None if it attends to all earlier tokens."""

    ffn_hidden_size: int
    """Width of the MLP."""

    kv_channels: int
    """Width of one attention head."""

    num_query_groups: int
    """Number of key/value heads."""

    values_are_keys: bool = False
    """True if the keys are also used as values."""

    sparsity: float = 0.0
    """Fraction of the MLP's gates that are set to zero."""

    keys_of: int | None = None
    """Number of the earlier layer whose keys and values this layer uses; None if it has its own."""

    @property
    def key_value_heads(self) -> int:
        """Number of key heads plus value heads that the layer computes; 0 if it uses an earlier layer's keys and
        values.
        """
        if self.keys_of is not None:
            return 0
        return self.num_query_groups * (1 if self.values_are_keys else 2)


def layer_shapes(model: "ModelConfig") -> tuple[LayerShape, ...]:
    """Returns the sizes of every layer."""
    windows: tuple[int | None, ...] = (None,) * model.num_layers
    if model.window_size is not None:
        tokens = window_tokens(model.window_size)
        windowed = windowed_layers(model.window_attn_skip_freq, model.num_layers)
        windows = tuple(tokens if has_window else None for has_window in windowed)
    widths = ffn_widths(model.ffn_hidden_sizes, model.num_layers)
    if widths is None:
        widths = (model.resolved_ffn_hidden_size,) * model.num_layers
    sources = _sources(windows, model.num_kv_shared_layers)
    cut_off = sparsities(model.mlp_activation_sparsity, model.num_layers)
    return tuple(
        replace(_shape(model, window, width, source), sparsity=sparsity)
        for window, width, source, sparsity in zip(windows, widths, sources, cut_off, strict=True)
    )


def _sources(windows: tuple[int | None, ...], num_shared: int) -> list[int | None]:
    """Returns for each layer the number of the layer whose keys and values it uses; None for its own."""
    first = len(windows) - num_shared
    last_of_kind = {window: layer for layer, window in enumerate(windows[:first])}
    return [None] * first + [last_of_kind.get(window) for window in windows[first:]]


def _shape(model: "ModelConfig", window: int | None, ffn_hidden_size: int, source: int | None) -> LayerShape:
    channels, groups = model.resolved_kv_channels, model.resolved_num_query_groups
    if window is None:
        channels = channels if model.kv_channels_full is None else model.kv_channels_full
        groups = groups if model.num_query_groups_full is None else model.num_query_groups_full
    return LayerShape(
        window=window,
        ffn_hidden_size=ffn_hidden_size,
        kv_channels=channels,
        num_query_groups=groups,
        values_are_keys=model.attention_k_eq_v and window is None,
        keys_of=source,
    )


def ffn_widths(text: str | None, num_layers: int) -> tuple[int, ...] | None:
    """Returns the width of every layer's MLP for a value of --ffn-hidden-sizes; None if the flag is not given.

    Raises:
        ValueError: the value is not a list of one width per layer.
    """
    if text is None:
        return None
    widths = entries_of(text, num_layers)
    if widths is None or len(widths) != num_layers or min(widths) < 1:
        raise ValueError(
            f"--ffn-hidden-sizes {text}: must be a list of {num_layers} widths of at least 1, one for "
            "each layer, such "
            "as [256]*2+[512]*2"
        )
    return tuple(widths)


def check_layers(model: "ModelConfig") -> None:
    """Raises `ValueError` if flags for layers have impossible values, contradict each other or have no effect."""
    check_at_least(model, 1, "num_query_groups_full", "kv_channels_full")
    if model.ffn_hidden_sizes is not None and model.ffn_hidden_size is not None:
        raise ValueError(
            f"--ffn-hidden-size {model.ffn_hidden_size}: cannot be given together with "
            "--ffn-hidden-sizes, which gives the width of every layer"
        )
    ffn_widths(model.ffn_hidden_sizes, model.num_layers)
    if model.window_size is None:
        for name in ("kv_channels_full", "num_query_groups_full"):
            require_default(model, name, "--window-size")
    if model.has_own_attention and model.attention_backend != "sdpa":
        names = ("num_kv_shared_layers", "attention_k_eq_v", "v_layernorm")
        given = ", ".join(flag_name(name) for name in names if getattr(model, name))
        raise ValueError(f"{given}: requires --attention-backend sdpa (got {model.attention_backend})")
    _check_sharing(model)
    groups = model.num_query_groups_full
    if groups is not None and model.num_attention_heads % groups:
        raise ValueError(
            f"--num-query-groups-full {groups}: must divide --num-attention-heads {model.num_attention_heads}"
        )
    _check_rotation(model)


def _check_rotation(model: "ModelConfig") -> None:
    channels, proportion = model.kv_channels_full, model.rotary_proportion
    if proportion != 1.0 and model.rotary_percent != 1.0:
        raise ValueError(
            f"--rotary-proportion {proportion}: cannot be given together with --rotary-percent {model.rotary_percent}"
        )
    if proportion != 1.0 and model.use_rope_scaling:
        raise ValueError(
            f"--rotary-proportion {proportion}: cannot be given together with --use-rope-scaling"
        )
    if proportion != 1.0 and not rotated_pairs(channels or model.resolved_kv_channels, proportion):
        width = channels or model.resolved_kv_channels
        raise ValueError(
            f"--rotary-proportion {proportion}: rotates no channels of a head; must be at least 2 / {width}, "
            f"which rotates 2 of its {width} channels"
        )
    if channels is not None and model.position_embedding_type == "rope":
        rotated = int(channels * model.rotary_percent)
        if rotated % 2 or not rotated:
            raise ValueError(
                f"--kv-channels-full {channels}: --rotary-percent {model.rotary_percent} rotates "
                f"{rotated} channels of "
                "a head; this number must be even and above 0"
            )


def rotated_pairs(channels: int, proportion: float) -> int:
    """Returns the number of pairs of channels that are rotated, rounded as in the library transformers."""
    return int(proportion * channels // 2)


def _check_sharing(model: "ModelConfig") -> None:
    num_shared, layers = model.num_kv_shared_layers, model.num_layers
    if not 0 <= num_shared < layers:
        raise ValueError(f"--num-kv-shared-layers {num_shared}: must lie in [0, {layers - 1}]")
    for number in range(layers - num_shared, layers):
        if model.layers[number].keys_of is None:
            kind = "no" if model.layers[number].window is None else "a"
            raise ValueError(
                f"--num-kv-shared-layers {num_shared}: layer {number} (counted from 0) has {kind} sliding window, "
                f"but none of the first {layers - num_shared} layers is of this kind, so no layer can supply its keys "
                "and values"
            )


def refuse_layer_sizes(model: "ModelConfig", by: str) -> None:
    """Raises `ValueError` if layers differ in size or parts; `by` names the feature that requires equal layers."""
    for name in LAYER_DIFFERENCES:
        value = getattr(model, name)
        if value:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{flag_name(name)}{shown}: not supported by {by}")
