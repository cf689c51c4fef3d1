"""The base model: sizes, positions, norm, activation, dropout and initialisation.

Names and defaults are Megatron's, but for the three that say otherwise: rotary positions and RMSNorm are the defaults,
and `--num-query-groups` alone turns on grouped-query attention. What a family adds to a layer is the family's config.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_ext.config.command_line.field_checks import (
    Switch,
    check_at_least,
    check_at_most,
    check_choices,
    check_fraction,
    check_numbers,
    check_positive,
    flag,
    flag_name,
)

_ROPE_SCALING = (
    "use_rope_scaling",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
)


def check_fits_window(window: int | None, length: int, asked: str) -> None:
    """Raises `ValueError` for a sequence that is longer than a model's sliding window.

    Args:
        window: the model's `sliding_window`.
        length: tokens of the sequence.
        asked: the flags and values that ask for it, the beginning of the message.
    """
    if window is not None and length > window:
        raise ValueError(
            f"{asked}: a sequence of {length} tokens exceeds the model's sliding window of {window} "
            "(--sliding-window); windows are not built yet, so a sequence must fit into one"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of the base GPT model."""

    num_layers: int
    """Number of transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    num_attention_heads: int
    """Number of attention heads."""

    seq_length: Annotated[int, flag(aliases=("--max_length",))]
    """Tokens in a training sequence."""

    ffn_hidden_size: int | None = None
    """Width of the MLP. Without it 4 * hidden size; with --swiglu two thirds of that, down to a multiple of 64."""

    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). Without it every head has its own."""

    group_query_attention: bool = False
    """Megatron's switch for grouped-query attention; asks for --num-query-groups, which alone is enough here."""

    kv_channels: int | None = None
    """Width of one attention head. Without it hidden size / heads."""

    max_position_embeddings: int | None = None
    """Longest position the model is built for. Without it the sequence length."""

    sliding_window: int | None = None
    """Tokens that an attention layer of the model looks back over, as imported; attention here looks at all, which is
    the same on sequences up to the window: longer ones are refused."""

    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions enter the model."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Part of a head's width that is rotated, in (0, 1]."""

    rotary_seq_len_interpolation_factor: float | None = None
    """Rotary positions are divided by this (linear scaling), for sequences longer than those first trained on."""

    use_rope_scaling: bool = False
    """Llama 3's scaling: slow rotary frequencies are divided by a factor, fast ones kept, those between blended."""

    rope_scaling_factor: float = 8.0
    """Llama 3's scaling: the factor."""

    rope_low_freq_factor: float = 1.0
    """Llama 3's scaling: wavelengths above the original length divided by this are slow."""

    rope_high_freq_factor: float = 4.0
    """Llama 3's scaling: wavelengths below the original length divided by this are fast."""

    rope_original_max_position_embeddings: int = 8192
    """Llama 3's scaling: the original length, in tokens."""

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Norm before attention and MLP, and at the end."""

    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""

    swiglu: bool = False
    """Gated MLP with SiLU instead of GELU."""

    disable_bias_linear: Switch = False
    """No bias in the linear layers."""

    add_qkv_bias: bool = False
    """A bias in the query/key/value projection although --disable-bias-linear is on."""

    add_attention_output_bias: bool = False
    """A bias in the attention's output projection although --disable-bias-linear is on."""

    add_mlp_bias: bool = False
    """Biases in the MLP although --disable-bias-linear is on."""

    qk_layernorm: bool = False
    """Norm on queries and keys, head by head."""

    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the word embedding's transpose."""

    hidden_dropout: float = 0.1
    """Dropout on the residual branches and the embedding."""

    attention_dropout: float = 0.1
    """Dropout on the attention probabilities."""

    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    attention_backend: Literal["sdpa", "local", "te"] = "sdpa"
    """Core attention: torch's scaled_dot_product_attention, mcore's local one, or Transformer Engine's."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers: mcore's own or Transformer Engine's; auto takes what is installed."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_most(self, 10**5, "num_layers")
        check_at_least(
            self, 1, "num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size"
        )
        check_at_least(
            self, 1, "num_query_groups", "kv_channels", "rotary_base", "make_vocab_size_divisible_by"
        )
        check_positive(self, "norm_epsilon", "rotary_percent", "init_method_std")
        check_fraction(self, "hidden_dropout", "attention_dropout")
        check_fraction(self, "rotary_percent", closed=True)
        self._check_heads()
        self._check_mlp()
        self._check_rotary()
        self._check_rotary_scaling()
        self._check_window()
        if self.max_position_embeddings is not None and self.max_position_embeddings < self.seq_length:
            raise ValueError(
                f"--max-position-embeddings {self.max_position_embeddings}: less than --seq-length {self.seq_length}"
            )
        if self.attention_backend == "te" and self.transformer_impl == "local":
            raise ValueError(
                "--attention-backend te: needs Transformer Engine, but --transformer-impl is local"
            )

    def _check_mlp(self) -> None:
        if self.resolved_ffn_hidden_size < 1:
            raise ValueError(
                f"--hidden-size {self.hidden_size}: the MLP's width that follows from it with --swiglu is 0 "
                "(8/3 of it, down to a multiple of 64); give --ffn-hidden-size"
            )

    def _check_rotary(self) -> None:
        """Rotary settings that would have no effect are refused, as a number of channels that cannot be rotated is."""
        if self.position_embedding_type != "rope":
            for name in (
                "rotary_base",
                "rotary_percent",
                "rotary_seq_len_interpolation_factor",
                *_ROPE_SCALING,
            ):
                self._require_default(
                    name, f"--position-embedding-type rope, it is {self.position_embedding_type}"
                )
            return
        if not self.use_rope_scaling:
            for name in _ROPE_SCALING[1:]:
                self._require_default(name, "--use-rope-scaling")
        channels = self.resolved_kv_channels
        rotated = int(channels * self.rotary_percent)
        if rotated % 2 or not rotated:
            sizes = f"--hidden-size {self.hidden_size}, --num-attention-heads {self.num_attention_heads}"
            given = sizes if self.kv_channels is None else f"--kv-channels {channels}"
            raise ValueError(
                f"{given}: a head has {channels} channels, of which --rotary-percent {self.rotary_percent} "
                f"rotates {rotated}; the number must be even"
                f"{'' if rotated else ' and above 0'}"
            )

    def _require_default(self, name: str, needed: str) -> None:
        value = getattr(self, name)
        if value != type(self).__dataclass_fields__[name].default:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{flag_name(name)}{shown}: has no effect, it needs {needed}")

    def _check_window(self) -> None:
        check_at_least(self, 1, "sliding_window")
        check_fits_window(self.sliding_window, self.seq_length, f"--seq-length {self.seq_length}")

    def _check_rotary_scaling(self) -> None:
        names = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
        check_positive(self, *names)
        check_at_least(self, 1e-6, "rotary_seq_len_interpolation_factor")  # frequencies must stay finite
        check_at_least(self, 1, "rope_original_max_position_embeddings")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                f"--rope-high-freq-factor {self.rope_high_freq_factor}: must be above "
                f"--rope-low-freq-factor {self.rope_low_freq_factor}"
            )
        factor = self.rotary_seq_len_interpolation_factor
        if factor is not None and self.use_rope_scaling:
            raise ValueError(
                f"--rotary-seq-len-interpolation-factor {factor}: not together with --use-rope-scaling"
            )

    def _check_heads(self) -> None:
        heads = self.num_attention_heads
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"--num-attention-heads {heads}: does not divide --hidden-size {self.hidden_size}"
            )
        if self.group_query_attention and self.num_query_groups is None:
            raise ValueError("--group-query-attention: needs --num-query-groups")
        if self.num_query_groups is not None and heads % self.num_query_groups:
            raise ValueError(
                f"--num-query-groups {self.num_query_groups}: does not divide --num-attention-heads {heads}"
            )

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query/key/value projection has a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.add_attention_output_bias or not self.disable_bias_linear

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the MLP's projections have biases."""
        return self.add_mlp_bias or not self.disable_bias_linear

    @property
    def resolved_ffn_hidden_size(self) -> int:
        """Width of the MLP, the default applied (Megatron's rule for SwiGLU included)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return int(4 * self.hidden_size * 2 / 3 / 64) * 64
        return 4 * self.hidden_size

    @property
    def resolved_num_query_groups(self) -> int:
        """Number of key/value heads, the default applied."""
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def resolved_kv_channels(self) -> int:
        """Width of one head, the default applied."""
        return (
            self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads
        )

    @property
    def resolved_max_position_embeddings(self) -> int:
        """Longest position, the default applied."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length


def on_this_machine(section: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's section `model` with this machine's implementations where Transformer Engine is not installed.

    Linear layers and attention compute the same in either implementation, and have the same weights.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        return dict(section)
    others = {"transformer_engine": "auto", "te": "sdpa"}
    names = ("transformer_impl", "attention_backend")
    return {
        **section,
        **{name: others.get(section[name], section[name]) for name in names if name in section},
    }
