"""Flags of per-layer embedding (PLE), and the presets `gemma4` and `gemma3n`.

Names and defaults are specified in docs/design/per_layer_embedding.md. The preset `gemma4` gives Gemma 4's block: the
per-layer ids are the token ids and the tables have as many rows as the vocabulary; the gate's activation is gelu_tanh;
the block comes after the MLP and is followed by `x <- x * layer_scalar`. The preset `gemma3n` gives Gemma 3n's block,
for a model with AltUp's residual streams: its input is the active stream times a vector, and its output is added to
all other streams. The tables may have fewer rows than the vocabulary; ids without a row use row 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_choices,
    check_fraction,
    check_positive,
    flag_name,
)
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.per_layer.ngrams import PRIME
from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS, WITHOUT_VOCABULARY, Strategy
from megatron_ext.lora.adapter_config import AdapterConfig

_MOST_HASHES = 64  # more rows per token than anyone has use for; a mistyped number would take minutes to hash

_GEMMA = {
    "per_layer_combination_method": "scaled_add",
    "per_layer_gate_activation": "gelu_tanh",
    "per_layer_position": "after_mlp",
    "per_layer_strategy": "identity",
}
"""Fields that every preset sets, with their values; it is an error if the user gives another value."""

_DEFAULT_ROWS = 10_000
"""Number of rows of a table if the number of per-layer ids is unknown."""


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """Flags for per-layer embedding: every layer has a small token embedding, which is gated into the residual
    stream.
    """

    use_per_layer_embedding: bool = False
    """Add per-layer embedding to every layer."""

    per_layer_preset: Literal["gemma4", "gemma3n"] | None = None
    """Sets several flags: token ids as per-layer ids, gelu_tanh, after_mlp, scaled_add. gemma4 also has a layer
    scalar; gemma3n requires --altup-streams: the block reads the active stream, and its output is added to all
    others.
    """

    per_layer_vocab_size: int | None = None
    """Number of rows of every per-layer table. Default: the number of ids in the per-layer data; with
    --per-layer-strategy identity, the tokenizer's vocabulary size; if unknown, 10000. Required with bigram_hash and
    trigram_hash.
    """

    per_layer_hidden_size: int = 1024
    """Width of the per-layer embeddings."""

    per_layer_combination_method: Literal["scaled_add", "concat", "gated"] = "scaled_add"
    """Method that combines the per-layer token embedding with the projected word embedding."""

    per_layer_gate_activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swish"] = "silu"
    """Activation of the gate; swish is the same as silu."""

    per_layer_position: Literal["before_layer", "after_mlp"] = "before_layer"
    """Position of the block in a layer: before the attention's norm, or after the MLP as in Gemma."""

    per_layer_projection_dropout: float = 0.0
    """Dropout on the combined per-layer vector."""

    per_layer_embed_scale: float = 1.0
    """Factor by which a row of a table is multiplied, in addition to the square root of --per-layer-hidden-size."""

    per_layer_init_method: Literal["normal", "xavier_normal", "zeros"] = "normal"
    """Initialization of all per-layer weights. normal: N(0, std); xavier_normal: variance 2 / (rows + columns); zeros:
    tables are zero, other weights N(0, std).
    """

    per_layer_init_std: float | None = None
    """Standard deviation of the initial weights. Default: --init-method-std."""

    per_layer_lr_scale: float = 1.0
    """Factor by which the learning rate of all per-layer parameters is multiplied."""

    per_layer_weight_decay: float | None = None
    """Weight decay of all per-layer parameters. Default: --weight-decay."""

    freeze_per_layer_embedding: bool = False
    """Freeze the per-layer tables; gates and projections still train."""

    per_layer_sparse: bool = False
    """Train the per-layer tables by rows: gradients, communication and updates are limited to the rows that a step
    looks up.
    """

    per_layer_optimizer: Literal["adam", "lazy_adam", "rowwise_adagrad", "sgd"] = "adam"
    """With --per-layer-sparse: optimizer of the tables. adam: the same updates as without --per-layer-sparse; a row
    makes up for missed updates at its next use. lazy_adam: rows change only when they are used. rowwise_adagrad: one
    number of state per row. sgd: no state.
    """

    per_layer_offload: Literal["cpu", "disk"] | None = None
    """With --per-layer-sparse: keep tables and their optimizer state off the device, in the host's memory (cpu) or in
    files (disk). The data-parallel ranks of a host share one copy; the device holds only the rows of a step.
    """

    per_layer_offload_dir: str | None = None
    """With --per-layer-offload disk: directory of the files, on a disk of the host. The files have no names, and
    disappear when the run ends. Default: --save.
    """

    per_layer_vocab_file: str | None = None
    """Per-layer vocabulary (JSON, from tools/preprocess_per_layer_data.py), which maps token ids to per-layer ids."""

    per_layer_strategy: Strategy = "syntax_focus"
    """Strategy that maps token ids to per-layer ids. bigram_hash hashes the last two tokens to rows, which are summed;
    trigram_hash also hashes the last three.
    """

    per_layer_hashes: int = 2
    """With --per-layer-strategy bigram_hash or trigram_hash: number of hash functions; each gives an n-gram one row."""

    per_layer_data_path: tuple[str, ...] | None = None
    """Prefixes of the datasets with the per-layer ids: one for each dataset of --data-path, in the same order."""

    log_per_layer_stats: bool = False
    """Write per-layer statistics to TensorBoard."""

    log_per_layer_gradients: bool = False
    """Write norms of the per-layer gradients to TensorBoard."""

    per_layer_stats_interval: int = 100
    """Number of steps between two records of the per-layer statistics."""

    SET_BY_PRESET: ClassVar = tuple(_GEMMA)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.per_layer_preset is not None:
            self._apply(_GEMMA)
        check_at_least(
            self,
            1,
            "per_layer_vocab_size",
            "per_layer_hidden_size",
            "per_layer_hashes",
            "per_layer_stats_interval",
        )
        check_at_least(self, 0, "per_layer_lr_scale", "per_layer_weight_decay")
        check_positive(self, "per_layer_embed_scale", "per_layer_init_std")
        check_fraction(self, "per_layer_projection_dropout")
        if self.per_layer_optimizer != "adam" and not self.per_layer_sparse:
            raise ValueError(f"--per-layer-optimizer {self.per_layer_optimizer}: requires --per-layer-sparse")
        if self.per_layer_offload is not None and not self.per_layer_sparse:
            raise ValueError(f"--per-layer-offload {self.per_layer_offload}: requires --per-layer-sparse")
        if self.per_layer_offload_dir is not None and self.per_layer_offload != "disk":
            raise ValueError(
                f"--per-layer-offload-dir {self.per_layer_offload_dir}: requires --per-layer-offload disk"
            )
        self._check_hashes()
        if not self.use_per_layer_embedding:
            for name in ("per_layer_preset", "per_layer_vocab_file", "per_layer_data_path"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{flag_name(name)} {getattr(self, name)}: requires --use-per-layer-embedding"
                    )

    def _check_hashes(self) -> None:
        strategy, rows = self.per_layer_strategy, self.per_layer_vocab_size
        default = type(self).__dataclass_fields__["per_layer_hashes"].default
        if not self.hashes_ngrams:
            if self.per_layer_hashes != default:
                raise ValueError(
                    f"--per-layer-hashes {self.per_layer_hashes}: requires --per-layer-strategy bigram_hash or "
                    f"trigram_hash (got {strategy})"
                )
            return
        if self.per_layer_hashes > _MOST_HASHES:
            raise ValueError(f"--per-layer-hashes {self.per_layer_hashes}: must be at most {_MOST_HASHES}")
        if rows is None:
            raise ValueError(
                f"--per-layer-strategy {strategy}: requires --per-layer-vocab-size, the number of rows that n-grams "
                "are hashed to"
            )
        if rows > PRIME:
            raise ValueError(
                f"--per-layer-vocab-size {rows}: must be at most {PRIME} with --per-layer-strategy {strategy}"
            )
        if self.per_layer_vocab_file is not None:
            raise ValueError(
                f"--per-layer-vocab-file {self.per_layer_vocab_file}: --per-layer-strategy {strategy} does not read "
                "such a file; omit the flag"
            )

    def _apply(self, preset: dict[str, str]) -> None:
        defaults = type(self).__dataclass_fields__
        for name, value in preset.items():
            given = getattr(self, name)
            if given not in (value, defaults[name].default):
                raise ValueError(
                    f"{flag_name(name)} {given}: --per-layer-preset {self.per_layer_preset} sets it to {value}; "
                    "omit one of the two"
                )
            object.__setattr__(self, name, value)

    @property
    def uses_token_ids(self) -> bool:
        """Whether the per-layer ids are the token ids."""
        return self.per_layer_strategy == "identity"

    @property
    def hashes_ngrams(self) -> bool:
        """Whether the per-layer ids are rows that n-grams of tokens are hashed to."""
        return self.per_layer_strategy in NGRAM_TOKENS

    @property
    def needs_table(self) -> bool:
        """Whether the per-layer ids are looked up in a table of token ids, made from a per-layer vocabulary."""
        return self.per_layer_strategy not in WITHOUT_VOCABULARY

    @property
    def rows_per_token(self) -> int:
        """Number of rows of a table that are summed for a token."""
        return (
            self.per_layer_hashes * (NGRAM_TOKENS[self.per_layer_strategy] - 1) if self.hashes_ngrams else 1
        )

    @property
    def trains_rows(self) -> bool:
        """Whether the tables are trained by rows."""
        return self.per_layer_sparse and not self.freeze_per_layer_embedding

    def check_directory(self) -> None:
        """Raises `ValueError` if --per-layer-offload disk has no directory."""
        if self.per_layer_offload == "disk" and self.per_layer_offload_dir is None:
            raise ValueError(
                "--per-layer-offload disk: requires a directory; pass --per-layer-offload-dir or --save"
            )

    @property
    def has_layer_scalar(self) -> bool:
        """Whether a layer's output is multiplied by its `layer_scalar`."""
        return self.per_layer_preset == "gemma4"

    @property
    def adds_to_inactive_streams(self) -> bool:
        """Whether the block reads AltUp's active residual stream, and its output is added to all other streams."""
        return self.per_layer_preset == "gemma3n"

    def rows(self, vocab_size: int, num_ids: int | None = None) -> int:
        """Returns the number of rows of a table.

        Args:
            vocab_size: the tokenizer's vocabulary size.
            num_ids: number of per-layer ids in the run's vocabulary or data; None if unknown.

        Raises:
            ValueError: the per-layer ids are the token ids, but --per-layer-vocab-size is not the vocabulary size
                (or, with the preset gemma3n, exceeds it).
        """
        if not self.uses_token_ids:
            return self.per_layer_vocab_size or num_ids or _DEFAULT_ROWS
        if self.adds_to_inactive_streams and 1 <= (self.per_layer_vocab_size or 0) <= vocab_size:
            return self.per_layer_vocab_size or vocab_size
        if self.per_layer_vocab_size not in (vocab_size, None):
            limit = "at most " if self.adds_to_inactive_streams else ""
            raise ValueError(
                f"--per-layer-vocab-size {self.per_layer_vocab_size}: must be {limit}the vocabulary size, "
                f"{vocab_size}, because the per-layer ids are the token ids; omit the flag"
            )
        return vocab_size

    def check_streams(self, altup_streams: int | None) -> None:
        """Raises `ValueError` unless the preset suits the number of the model's residual streams; None means one."""
        if self.adds_to_inactive_streams and altup_streams is None:
            raise ValueError("--per-layer-preset gemma3n: requires --altup-streams")
        if not self.adds_to_inactive_streams and altup_streams is not None:
            raise ValueError(
                f"--altup-streams {altup_streams}: per-layer embedding requires --per-layer-preset gemma3n (got "
                f"{self.per_layer_preset})"
            )

    def check_layout(self, tensor_parallel_size: int) -> None:
        """Raises `ValueError` unless the tensor-parallel size divides the per-layer hidden size."""
        if self.per_layer_hidden_size % tensor_parallel_size:
            raise ValueError(
                f"--per-layer-hidden-size {self.per_layer_hidden_size}: must be divisible by "
                f"--tensor-model-parallel-size {tensor_parallel_size}"
            )


@dataclass(frozen=True, kw_only=True)
class PerLayerRunConfig(RunConfig):
    """Configuration of a run with per-layer embedding."""

    per_layer: PerLayerConfig
    """Per-layer embedding."""

    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA adapters for a loaded model, with or without per-layer embedding."""

    def resolved(self, world_size: int, *, epoch_samples: int | None = None) -> "PerLayerRunConfig":
        """Does the same as `RunConfig.resolved`; also checks PLE's flags, and fills in its directory for offloading."""
        if self.per_layer.use_per_layer_embedding and self.per_layer.trains_rows:
            self._check_rows()
        resolved = super().resolved(world_size, epoch_samples=epoch_samples)
        return replace(resolved, per_layer=self._with_directory())

    def _with_directory(self) -> PerLayerConfig:
        """Returns PLE's settings with the directory for --per-layer-offload disk filled in.

        In a rehearsal, which writes no files, they have --per-layer-offload cpu instead.
        """
        settings, save = self.per_layer, self.checkpoint.save
        if settings.per_layer_offload != "disk":
            return settings
        if self.checkpoint.async_save:
            raise ValueError(
                "--async-save: does not support --per-layer-offload disk, because it copies all saved "
                "tensors into memory; omit the flag"
            )
        if self.rehearsal.is_on:
            return replace(settings, per_layer_offload="cpu", per_layer_offload_dir=None)
        if settings.per_layer_offload_dir is None and save is not None:
            settings = replace(settings, per_layer_offload_dir=save)
        if not self.training.dry_run:
            settings.check_directory()
        return settings

    def _check_rows(self) -> None:
        settings, adam = self.per_layer, self.optimizer
        if settings.per_layer_optimizer == "adam" and adam.adam_beta1**2 >= adam.adam_beta2:
            raise ValueError(
                f"--per-layer-optimizer adam: requires --adam-beta2 above the square of --adam-beta1 (got "
                f"{adam.adam_beta2} and {adam.adam_beta1}), because otherwise a row would keep moving "
                "forever after its last gradient; or pass --per-layer-optimizer lazy_adam"
            )
        rate = adam.lr * settings.per_layer_lr_scale
        decay = max(adam.weight_decay, adam.end_weight_decay or 0.0)
        if settings.per_layer_weight_decay is not None:
            decay = settings.per_layer_weight_decay
        if rate * decay >= 1.0:
            raise ValueError(
                "--per-layer-sparse: the tables' learning rate times their weight decay must be below 1 "
                f"(got {rate:g} times {decay:g}), because decay must not change a weight's sign"
            )


def inherited(found: Found, given: Mapping[str, Any]) -> Found:
    """Returns the values that a run with the flags `given` takes over from a checkpoint.

    They do not include the place of the tables, which depends on the machine, nor the optimizer of rows if the run
    trains whole tables.
    """
    omitted = {"per_layer_offload", "per_layer_offload_dir"}
    if given.get("per_layer_sparse") is False:
        omitted.add("per_layer_optimizer")
    sections = {
        group: {name: value for name, value in values.items() if name not in omitted}
        for group, values in found.sections.items()
    }
    return replace(found, sections=sections)
