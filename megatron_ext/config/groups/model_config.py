"""The base model: sizes, positions, norm, activation, dropout and initialization.

Names and defaults are Megatron's, with three exceptions: rotary positions and RMSNorm are the defaults, and
`--num-query-groups` alone turns on grouped-query attention. Each model family configures its modules in its own group.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

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
from megatron_ext.config.command_line.layer_windows import (
    layers_without_rotary,
    window_tokens,
    windowed_layers,
)
from megatron_ext.config.groups.model.layer_shapes import (
    LayerFields,
    LayerShape,
    check_layers,
    ffn_widths,
    layer_shapes,
)
from megatron_ext.config.groups.model.parts_of_gemma3n import Gemma3nFields, check_parts_of_gemma3n
from megatron_ext.config.groups.model.positions import PositionFields, check_positions, require_default


def check_fits_window(window: int | None, length: int, asked: str) -> None:
    """Raises `ValueError` if a sequence is longer than the model's sliding window.

    Args:
        window: the model's `sliding_window`, in tokens.
        length: length of the sequence, in tokens.
        asked: the flags and values that set the length; the error message begins with this text.
    """
    if window is not None and length > window:
        raise ValueError(
            f"{asked}: a sequence of {length} tokens exceeds the model's sliding window of {window} "
            "(--sliding-window): the model was imported by an earlier version, without its window; use "
            "shorter sequences, or import the model again"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PositionFields, LayerFields, Gemma3nFields):
    """Flags for the sizes, layers and initialization of the base GPT model."""

    num_layers: int
    """Number of transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    num_attention_heads: int
    """Number of attention heads."""

    seq_length: Annotated[int, flag(aliases=("--max_length",))]
    """Tokens per training sequence."""

    ffn_hidden_size: int | None = None
    """Width of the MLP. Default: 4 x hidden size (with a gate: 8/3 x hidden size, rounded down to a multiple of
    64).
    """

    num_query_groups: int | None = None
    """Number of key/value heads. A number below --num-attention-heads gives grouped-query attention. Default: the
    number of attention heads.
    """

    group_query_attention: bool = False
    """Megatron's switch for grouped-query attention; requires --num-query-groups, which has the same effect alone."""

    kv_channels: int | None = None
    """Width of one attention head. Default: hidden size / number of attention heads."""

    window_size: Annotated[str | None, flag(metavar="LEFT,0")] = None
    """Sliding attention window, as in Megatron-LM: the number of earlier tokens that a token attends to besides itself,
    and 0 for later ones, such as 511,0. Default: attention to all earlier tokens.
    """

    window_attn_skip_freq: Annotated[str | None, flag(metavar="N | LIST")] = None
    """Layers without a window, as in Megatron-LM: every Nth layer, or a list with a 1 for each layer with a window and
    a 0 for each layer without, such as ([1]*5+[0])*2. Default: every layer has the window.
    """

    sliding_window: int | None = None
    """Longest sequence, in tokens, of a model with a sliding window that an earlier version imported without its
    window. Longer sequences are rejected; for all others, full attention gives the same result. Models imported now
    have a --window-size instead.
    """

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Type of the norms before attention, before the MLP, and after the last layer."""

    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""

    apply_layernorm_1p: bool = False
    """Store the weight of a norm as its difference from 1, so that it starts at 0, as in Gemma."""

    sandwich_norm: bool = False
    """Normalize not only the inputs of attention and MLP but also their outputs, before these are added to the
    residual stream, as in Gemma.
    """

    post_norm: bool = False
    """Normalize the outputs of attention and MLP, before they are added to the residual stream, instead of their
    inputs, as in OLMo 2.
    """

    swiglu: bool = False
    """Use a gated MLP with SiLU (SwiGLU) instead of an MLP with GELU."""

    geglu: bool = False
    """Use a gated MLP with GELU in its tanh approximation (GeGLU), as in Gemma, instead of an MLP with GELU."""

    squared_relu: bool = False
    """Use an MLP with squared ReLU instead of GELU."""

    bias_gelu_fusion: bool = False
    """Compute GELU in its tanh approximation, like Megatron-LM's fused kernel (its default for GELU with biases)."""

    disable_bias_linear: Switch = False
    """Leave out the biases of the linear layers."""

    add_qkv_bias: bool = False
    """With --disable-bias-linear: keep the bias of the query/key/value projection."""

    add_attention_output_bias: bool = False
    """With --disable-bias-linear: keep the bias of the attention's output projection."""

    add_mlp_bias: bool = False
    """With --disable-bias-linear: keep the biases of the MLP."""

    qk_layernorm: bool = False
    """Normalize the queries and keys of each attention head."""

    qk_projection_norm: bool = False
    """Normalize a token's queries over all heads together, and its keys likewise, with one weight per channel, as in
    OLMo 2.
    """

    softmax_scale: float | None = None
    """Factor of the attention scores. Default: 1 / sqrt(width of one attention head)."""

    embedding_multiplier: float = 1.0
    """Multiply the word embedding by this factor before the first layer. The factor is rounded to the dtype of the
    weights. In Gemma it is the square root of the hidden size.
    """

    residual_multiplier: float = 1.0
    """Multiply the outputs of attention and MLP by this factor before they are added to the residual stream, as in
    Granite.
    """

    logit_divisor: float = 1.0
    """Divide the logits by this number, as in Granite."""

    final_logit_softcapping: float | None = None
    """Limit the logits smoothly to absolute values below this number C: C tanh(logit / C). Default: no limit."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of sharing the word embedding."""

    hidden_dropout: float = 0.1
    """Dropout probability on the embedding and on the outputs of attention and MLP."""

    attention_dropout: float = 0.1
    """Dropout probability on the attention weights."""

    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary size to a multiple of this value x --tensor-model-parallel-size."""

    attention_backend: Literal["sdpa", "local", "te"] = "sdpa"
    """Implementation of core attention: torch's scaled_dot_product_attention (sdpa), mcore's (local), or Transformer
    Engine's (te).
    """

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of linear layers: mcore's (local) or Transformer Engine's; auto uses Transformer Engine if it is
    installed and there is a GPU.
    """

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply the linear layers' matrices in FP8 with Transformer Engine: e4m3, or hybrid, which keeps gradients in
    e5m2. Requires --bf16.
    """

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """With --fp8-format: how values are scaled to FP8."""

    fp8_amax_history_len: int = 1
    """With --fp8-recipe delayed: number of past steps whose largest absolute values determine the scale."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """With --fp8-recipe delayed: compute the scale from the newest (most_recent) or the largest (max) of the values
    that --fp8-amax-history-len counts.
    """

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_most(self, 10**5, "num_layers")
        check_at_least(
            self, 1, "num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size"
        )
        check_at_least(self, 1, "num_query_groups", "kv_channels", "make_vocab_size_divisible_by")
        check_positive(self, "norm_epsilon", "init_method_std")
        check_positive(self, "softmax_scale", "embedding_multiplier", "final_logit_softcapping")
        check_positive(self, "residual_multiplier", "logit_divisor")
        check_fraction(self, "hidden_dropout", "attention_dropout")
        self._check_heads()
        self._check_norms()
        self._check_mlp()
        self._check_window()
        check_positions(self)
        check_layers(self)
        check_parts_of_gemma3n(self)
        if self.position_embedding_type == "learned_absolute" and self.embedding_multiplier != 1.0:
            raise ValueError(
                f"--embedding-multiplier {self.embedding_multiplier}: cannot be given together with "
                "--position-embedding-type learned_absolute, because the factor would also multiply "
                "the position embedding"
            )
        self._check_te()

    def _check_te(self) -> None:
        if self.requires_te and self.transformer_impl == "local":
            raise ValueError(
                f"{self.requires_te[0]}: requires --transformer-impl auto or transformer_engine (got local)"
            )
        check_at_least(self, 1, "fp8_amax_history_len")
        if self.fp8_format is None:
            require_default(self, "fp8_recipe", "--fp8-format")
        if self.fp8_format is None or self.fp8_recipe != "delayed":
            for name in ("fp8_amax_history_len", "fp8_amax_compute_algo"):
                require_default(self, name, "--fp8-format with --fp8-recipe delayed")

    def _check_norms(self) -> None:
        for name, other in (("post_norm", "sandwich_norm"), ("qk_projection_norm", "qk_layernorm")):
            if getattr(self, name) and getattr(self, other):
                raise ValueError(f"{flag_name(name)}: cannot be given together with {flag_name(other)}")
        if self.qk_projection_norm and self.normalization != "RMSNorm":
            raise ValueError(
                f"--qk-projection-norm: requires --normalization RMSNorm (got {self.normalization})"
            )

    def _check_mlp(self) -> None:
        chosen = [flag_name(name) for name in ("swiglu", "geglu", "squared_relu") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[-1]}: cannot be given together with {chosen[0]}")
        if self.is_gated or self.squared_relu or self.disable_bias_linear:
            require_default(self, "bias_gelu_fusion", "an MLP with GELU and biases")
        if self.resolved_ffn_hidden_size < 1:
            raise ValueError(
                f"--hidden-size {self.hidden_size}: too small for a gated MLP, whose default width is 0 "
                "(8/3 of the hidden size, rounded down to a multiple of 64); give --ffn-hidden-size"
            )

    def _check_window(self) -> None:
        check_at_least(self, 1, "sliding_window")
        check_fits_window(self.sliding_window, self.seq_length, f"--seq-length {self.seq_length}")
        windowed_layers(self.window_attn_skip_freq, self.num_layers)
        if self.window_size is None:
            require_default(self, "window_attn_skip_freq", "--window-size")
            return
        window_tokens(self.window_size)
        if self.attention_backend != "sdpa":
            raise ValueError(
                f"--window-size {self.window_size}: requires --attention-backend sdpa (got {self.attention_backend})"
            )

    def _check_heads(self) -> None:
        heads = self.num_attention_heads
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(f"--num-attention-heads {heads}: must divide --hidden-size {self.hidden_size}")
        if self.group_query_attention and self.num_query_groups is None:
            raise ValueError("--group-query-attention: requires --num-query-groups")
        if self.num_query_groups is not None and heads % self.num_query_groups:
            raise ValueError(
                f"--num-query-groups {self.num_query_groups}: must divide --num-attention-heads {heads}"
            )

    @property
    def requires_te(self) -> list[str]:
        """The given flags, with their values, that require Transformer Engine."""
        required = {
            "fp8_format": ["e4m3", "hybrid"],
            "attention_backend": ["te"],
            "transformer_impl": ["transformer_engine"],
        }
        return [
            f"{flag_name(name)} {getattr(self, name)}"
            for name, values in required.items()
            if getattr(self, name) in values
        ]

    @cached_property
    def layers(self) -> tuple[LayerShape, ...]:
        """The sizes of each layer."""
        return layer_shapes(self)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the number of tokens that a token attends to, including itself; None without a window."""
        return tuple(layer.window for layer in self.layers)

    @property
    def has_own_attention(self) -> bool:
        """True if any layer needs keys and values that megatron-core's attention cannot compute."""
        return self.num_kv_shared_layers > 0 or self.attention_k_eq_v or self.v_layernorm

    @property
    def has_two_rotaries(self) -> bool:
        """True if layers with a window have a rotary embedding that differs from all other layers'."""
        is_partial = self.window_size is not None and self.rotary_proportion != 1.0
        return is_partial or self.rotary_base_local is not None or self.kv_channels_full is not None

    @property
    def without_rotary(self) -> tuple[bool, ...]:
        """For each layer, True if --no-rope-freq removes its rotary positions."""
        return layers_without_rotary(self.no_rope_freq, self.num_layers)

    @property
    def changes_outputs(self) -> str | None:
        """The first given flag that changes the outputs of attention and MLP before these are added to the residual
        stream; None if there is none.
        """
        flags = {
            "--sandwich-norm": self.sandwich_norm,
            "--post-norm": self.post_norm,
            "--residual-multiplier": self.residual_multiplier != 1.0,
            "--altup-streams": self.altup_streams is not None,
            "--laurel-rank": self.laurel_rank is not None,
        }
        return next((flag for flag, is_set in flags.items() if is_set), None)

    @property
    def has_qk_norm(self) -> bool:
        """True if queries and keys are normalized."""
        return self.qk_layernorm or self.qk_projection_norm

    @property
    def has_qkv_bias(self) -> bool:
        """True if the query/key/value projection has a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        """True if the attention's output projection has a bias."""
        return self.add_attention_output_bias or not self.disable_bias_linear

    @property
    def has_mlp_bias(self) -> bool:
        """True if the MLP's projections have biases."""
        return self.add_mlp_bias or not self.disable_bias_linear

    @property
    def is_gated(self) -> bool:
        """True if the MLP has a gate."""
        return self.swiglu or self.geglu

    @property
    def resolved_ffn_hidden_size(self) -> int:
        """Width of the MLP: --ffn-hidden-size, or its default; the largest one if layers differ."""
        if self.ffn_hidden_sizes is not None:
            return max(ffn_widths(self.ffn_hidden_sizes, self.num_layers) or ())
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.is_gated:
            return int(4 * self.hidden_size * 2 / 3 / 64) * 64
        return 4 * self.hidden_size

    @property
    def resolved_num_query_groups(self) -> int:
        """Number of key/value heads; without --num-query-groups, the number of attention heads."""
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def resolved_kv_channels(self) -> int:
        """Width of one attention head; without --kv-channels, the hidden size / number of attention heads."""
        return (
            self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads
        )

    @property
    def resolved_max_position_embeddings(self) -> int:
        """Largest number of positions; without --max-position-embeddings, the sequence length."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length
