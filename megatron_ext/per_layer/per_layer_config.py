"""What a user chooses about per-layer embedding (PLE): document 003's flags and defaults, and the `gemma4` preset.

The preset stands for the block of Gemma 4: ids are the token ids themselves and the tables as large as the vocabulary,
the gate is gelu_tanh, the block stands after the MLP and is followed by `x <- x * layer_scalar`.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_choices,
    check_fraction,
    check_positive,
    flag_name,
)
from megatron_ext.config.run_config import RunConfig

_GEMMA4 = {
    "per_layer_combination_method": "scaled_add",
    "per_layer_gate_activation": "gelu_tanh",
    "per_layer_position": "after_mlp",
    "per_layer_strategy": "identity",
}
"""What the preset sets; it stands in for a default, and refuses another choice."""

_DEFAULT_ROWS = 10_000
"""Document 003's number of rows, where nothing says how many ids there are."""


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """Per-layer embedding: a small token embedding for every layer, gated into the residual stream."""

    use_per_layer_embedding: bool = False
    """Add per-layer embedding to every layer."""

    per_layer_preset: Literal["gemma4"] | None = None
    """gemma4: Gemma 4's block. Sets token ids as ids, gelu_tanh, after_mlp, scaled_add, and a layer scalar."""

    per_layer_vocab_size: int | None = None
    """Rows of every per-layer table. Default: as many as the per-layer data has ids (else 10000)."""

    per_layer_hidden_size: int = 1024
    """Width of the per-layer embeddings."""

    per_layer_combination_method: Literal["scaled_add", "concat", "gated"] = "scaled_add"
    """How the token's per-layer embedding and the projected word embedding become one vector a layer."""

    per_layer_gate_activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swish"] = "silu"
    """Activation of the gate. swish is another name of silu."""

    per_layer_position: Literal["before_layer", "after_mlp"] = "before_layer"
    """Where the block stands in a layer: before the attention's norm, or after the MLP as in Gemma."""

    per_layer_projection_dropout: float = 0.0
    """Dropout on the combined per-layer vector."""

    per_layer_embed_scale: float = 1.0
    """Factor on the table's rows, beside the square root of the per-layer hidden size."""

    per_layer_init_method: Literal["normal", "xavier_normal", "zeros"] = "normal"
    """How weights are drawn: N(0, std); variance 2 / (rows + columns); or tables zero and the rest N(0, std)."""

    per_layer_init_std: float | None = None
    """Standard deviation of the initial weights. Without it --init-method-std."""

    per_layer_lr_scale: float = 1.0
    """Factor on the learning rate of all per-layer parameters."""

    per_layer_weight_decay: float | None = None
    """Weight decay of the per-layer matrices. Without it --weight-decay."""

    freeze_per_layer_embedding: bool = False
    """Keep the per-layer tables as they are; gates and projections still train."""

    per_layer_vocab_file: str | None = None
    """Per-layer vocabulary, JSON, from tools/preprocess_per_layer_data.py: ids are derived from the token ids."""

    per_layer_strategy: Literal[
        "syntax_focus", "semantic_focus", "attention_guidance", "random_subset", "identity"
    ] = "syntax_focus"
    """How token ids become per-layer ids."""

    per_layer_data_path: tuple[str, ...] | None = None
    """Prefixes of aligned per-layer datasets, in the order of --data-path. Read instead of deriving the ids."""

    log_per_layer_stats: bool = False
    """Write per-layer statistics to TensorBoard."""

    log_per_layer_gradients: bool = False
    """Write norms of the per-layer gradients to TensorBoard."""

    per_layer_stats_interval: int = 100
    """Steps between two values of the per-layer statistics."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.per_layer_preset == "gemma4":
            self._apply(_GEMMA4)
        check_at_least(self, 1, "per_layer_vocab_size", "per_layer_hidden_size", "per_layer_stats_interval")
        check_at_least(self, 0, "per_layer_lr_scale", "per_layer_weight_decay")
        check_positive(self, "per_layer_embed_scale", "per_layer_init_std")
        check_fraction(self, "per_layer_projection_dropout")
        if not self.use_per_layer_embedding:
            for name in ("per_layer_preset", "per_layer_vocab_file", "per_layer_data_path"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{flag_name(name)} {getattr(self, name)}: needs --use-per-layer-embedding"
                    )

    def _apply(self, preset: dict[str, str]) -> None:
        defaults = type(self).__dataclass_fields__
        for name, value in preset.items():
            given = getattr(self, name)
            if given not in (value, defaults[name].default):
                raise ValueError(
                    f"{flag_name(name)} {given}: --per-layer-preset {self.per_layer_preset} sets it to {value}"
                )
            object.__setattr__(self, name, value)

    @property
    def uses_token_ids(self) -> bool:
        """True where the per-layer ids are the token ids themselves."""
        return self.per_layer_strategy == "identity"

    @property
    def has_layer_scalar(self) -> bool:
        """True where a layer's output is multiplied by its `layer_scalar`."""
        return self.per_layer_preset == "gemma4"

    def rows(self, vocab_size: int, num_ids: int | None = None) -> int:
        """Rows of a table.

        Args:
            vocab_size: size of the tokenizer's vocabulary.
            num_ids: how many per-layer ids the run's vocabulary or data has, where that is known.

        Raises:
            ValueError: token ids are the ids, and another size than the tokenizer's was asked for.
        """
        if not self.uses_token_ids:
            return self.per_layer_vocab_size or num_ids or _DEFAULT_ROWS
        if self.per_layer_vocab_size not in (vocab_size, None):
            raise ValueError(
                f"--per-layer-vocab-size {self.per_layer_vocab_size}: the per-layer ids are the token ids, "
                f"of which there are {vocab_size}"
            )
        return vocab_size

    def check_layout(self, tensor_parallel_size: int) -> None:
        """Raises `ValueError` unless the tensor-parallel ranks can share the per-layer hidden size evenly."""
        if self.per_layer_hidden_size % tensor_parallel_size:
            raise ValueError(
                f"--per-layer-hidden-size {self.per_layer_hidden_size}: not divisible by "
                f"--tensor-model-parallel-size {tensor_parallel_size}"
            )


@dataclass(frozen=True, kw_only=True)
class PerLayerRunConfig(RunConfig):
    """All that a run with per-layer embedding is told."""

    per_layer: PerLayerConfig
    """Per-layer embedding."""
