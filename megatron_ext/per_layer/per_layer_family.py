"""The model family PLE (per-layer embedding): its part of the model, per-layer ids, optimizer settings and
statistics.

The per-layer ids are either looked up (`table[tokens]`), or the token ids themselves (strategy `identity`), or read
from a dataset that is aligned with the tokens. With `bigram_hash` and `trigram_hash` the batch contains, in place
of the ids, one number per token that identifies the n-gram ending there. It is computed from the whole sequence or
read from a dataset; `auxiliary_inputs` hashes it to rows.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in, group_to_dict
from megatron_ext.data.datasets.blends import parse_blend
from megatron_ext.data.indexed.manifest import read_manifest
from megatron_ext.data.per_layer.ngrams import check_vocabulary, hash_functions, ngram_numbers, starts_after
from megatron_ext.data.per_layer.per_layer_ids import ATTENTION_PERIOD
from megatron_ext.data.per_layer.per_layer_table import load_per_layer_table, rows_of
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL
from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_charts import PER_LAYER_CHARTS
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_cost import per_layer_activations, per_layer_cost
from megatron_ext.per_layer.per_layer_extension import PerLayerExtension
from megatron_ext.per_layer.per_layer_inputs import PER_LAYER_IDS, stage_module
from megatron_ext.per_layer.per_layer_statistics import start_recording, stop_recording
from megatron_ext.per_layer.sparse.row_optimizer import RowOptimizer
from megatron_ext.per_layer.sparse.row_statistics import RowStatistics
from megatron_ext.per_layer.sparse.row_updates import UPDATES, AdamConstants
from megatron_ext.platform import process_groups
from megatron_ext.training.interface.family_interface import PRECEDING_TOKENS, Batch, Family
from megatron_ext.training.interface.own_optimizer import OwnOptimizer


class PerLayerFamily(Family):
    """Per-layer embedding (PLE) as a model family."""

    name = "per_layer"

    charts = PER_LAYER_CHARTS

    free_on_resume = frozenset(
        {
            "per_layer_projection_dropout",
            "per_layer_init_method",
            "per_layer_init_std",
            "per_layer_lr_scale",
            "per_layer_weight_decay",
            "freeze_per_layer_embedding",
            "per_layer_sparse",
            "per_layer_optimizer",
            "per_layer_offload",
            "per_layer_offload_dir",
            "per_layer_vocab_file",
            "per_layer_data_path",
            "log_per_layer_stats",
            "log_per_layer_gradients",
            "per_layer_stats_interval",
        }
    )

    def __init__(
        self,
        settings: PerLayerConfig,
        vocab_size: int,
        table: "npt.ArrayLike | torch.Tensor | None" = None,
        *,
        eod: int | None = None,
    ) -> None:
        """Args:
        settings: PLE's configuration.
        vocab_size: V, the tokenizer's vocabulary size.
        table: [V], the per-layer id of each token id; None with a strategy that needs no table, or if every batch
            contains `per_layer_ids`.
        eod: the tokenizer's end-of-document id, which ends n-grams; only strategies with n-grams use it.

        Raises:
            ValueError: the table does not fit the vocabulary, or its ids do not fit the embedding.
        """
        self.settings = settings
        self.vocab_size = vocab_size
        self.rows = settings.rows(vocab_size)
        self.table = None if table is None else torch.as_tensor(table, dtype=torch.int64)
        self.eod = eod
        if self.table is not None:
            _check_table(self.table, vocab_size, self.rows)
        self._hash_functions = []
        if settings.hashes_ngrams:
            check_vocabulary(settings.per_layer_strategy, vocab_size)
            self._hash_functions = hash_functions(settings.per_layer_strategy, settings.per_layer_hashes)
        else:  # checkpoints from before this field do not have it
            self.free_on_resume = type(self).free_on_resume | {"per_layer_hashes"}
        if settings.uses_token_ids and not settings.adds_to_inactive_streams:
            self.free_on_resume |= {"per_layer_vocab_size"}
        logs = settings.log_per_layer_stats or settings.log_per_layer_gradients
        self._rows: RowOptimizer | None = None
        self.statistics_interval = settings.per_layer_stats_interval if logs else None

    @classmethod
    def from_tokenizer(
        cls, settings: PerLayerConfig, tokenizer: Tokenizer, *, mock_data: bool = False
    ) -> "PerLayerFamily":
        """Builds the model family; its ids come from aligned datasets or from the table of `--per-layer-vocab-file`.

        With `mock_data` and without a file, a synthetic table is used.

        Raises:
            ValueError: per-layer ids are required, but neither source is given.
            FileNotFoundError: the vocabulary or its table is missing.
        """
        table = None
        if settings.per_layer_vocab_file is not None and settings.needs_table:
            table = load_per_layer_table(
                settings.per_layer_strategy, tokenizer=tokenizer, vocab_file=settings.per_layer_vocab_file
            )
        elif mock_data and settings.needs_table:
            table = np.arange(tokenizer.vocab_size, dtype=np.int32) % settings.rows(tokenizer.vocab_size)
        aligned = settings.per_layer_data_path is not None
        if aligned and mock_data:
            raise ValueError("--per-layer-data-path: cannot be given together with --mock-data")
        if not aligned and not mock_data and settings.per_layer_strategy == "attention_guidance":
            raise ValueError(
                "--per-layer-strategy attention_guidance: requires --per-layer-data-path, because its "
                "ids depend on positions"
            )
        if not aligned and table is None and settings.needs_table:
            raise ValueError(
                "--use-per-layer-embedding: requires per-layer ids; pass --per-layer-vocab-file or "
                "--per-layer-data-path, or --per-layer-strategy identity, which uses the token ids"
            )
        if settings.per_layer_vocab_size is None and settings.needs_table:
            rows = settings.rows(tokenizer.vocab_size, _num_ids(settings, table))
            settings = replace(settings, per_layer_vocab_size=rows)
        return cls(settings, tokenizer.vocab_size, table, eod=tokenizer.eod)

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> "PerLayerFamily":
        """Rebuilds the model family from its `configuration()`; needs no file other than the checkpoint."""
        settings = group_in(PerLayerConfig, configuration, "settings")
        settings = replace(settings, per_layer_offload=None, per_layer_offload_dir=None)
        if settings.uses_token_ids and not settings.adds_to_inactive_streams:
            # older checkpoints store a default that does not apply to token ids
            settings = replace(settings, per_layer_vocab_size=None)
        return cls(
            settings,
            configuration["vocab_size"],
            configuration["table"],
            eod=configuration.get("end_of_document"),
        )

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Checks the tensor-parallel size and the number of residual streams, and that only one flag adds a layer
        scalar.

        Raises:
            ValueError: one of them does not fit PLE's configuration.
        """
        self.settings.check_streams(model.altup_streams)
        self.settings.check_layout(parallel.tensor_model_parallel_size)
        if model.layer_scalar and self.settings.has_layer_scalar:
            raise ValueError(
                f"--layer-scalar: --per-layer-preset {self.settings.per_layer_preset} already includes "
                "it; omit the flag"
            )

    def configuration(self) -> dict[str, Any]:
        """Returns PLE's settings, the vocabulary size, the table of ids and, with n-grams, the end-of-document id."""
        return {
            "settings": group_to_dict(self.settings),
            "vocab_size": self.vocab_size,
            "table": None if self.table is None else self.table.tolist(),
            **({"end_of_document": self.eod} if self.settings.hashes_ngrams else {}),
        }

    def extension(self) -> PerLayerExtension:
        """Returns PLE's contribution to the model."""
        return PerLayerExtension(self.settings, self.rows)

    def dataset_options(self) -> dict[str, Any]:
        """Returns the prefixes of the aligned per-layer datasets, and the strategy and per-layer vocabulary size
        that their manifests must record.
        """
        if self.settings.per_layer_data_path is None:
            return {}
        return {
            "per_layer_data_path": self.settings.per_layer_data_path,
            "per_layer_strategy": self.settings.per_layer_strategy,
            "per_layer_vocab_size": self.rows,
        }

    def sequence_fields(self, batch: Batch) -> Batch:
        """Computes the n-gram number of every token, [b, s], if the strategy needs it and the batch lacks it."""
        if not self.settings.hashes_ngrams or PER_LAYER_IDS in batch:
            return {}
        return {PER_LAYER_IDS: self._ngrams(batch)}

    def cost(self, model: ModelConfig) -> ModelCost:
        """Returns the parameters and FLOPs that PLE adds to `model`."""
        return per_layer_cost(self._as_trained, model, self.rows)

    def size_flags(self) -> str:
        """Returns the flags that determine the size of a table."""
        return f"--per-layer-vocab-size {self.rows}, --per-layer-hidden-size {self.settings.per_layer_hidden_size}"

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork | None:
        """Describes a step's work without the gradients of frozen tables; None if the tables are not frozen."""
        if not self.settings.freeze_per_layer_embedding:
            return None
        cost = self.cost(model)
        tables = model.num_layers * self.rows * self.settings.per_layer_hidden_size
        return StepWork(
            layers=(Use.TRAINED,) * model.num_layers,
            trained_parameters=cost.parameters - tables,
            flops_per_token=cost.training_flops_per_token,  # a look-up is not counted
        )

    def activations(self, layout: ParallelLayout, iteration: int) -> FamilyActivations:
        """Returns the bytes that PLE needs in a step; see `per_layer_activations`."""
        return per_layer_activations(self._as_trained, layout, self.rows)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Excludes the tables from the engine's training if they are frozen, or if a `RowOptimizer` trains them."""
        if self.settings.freeze_per_layer_embedding or self.settings.per_layer_sparse:
            for chunk in chunks:
                stage_module(chunk).freeze_tables()
        for chunk in chunks:
            stage_module(
                chunk
            ).memory.settle()  # one rank may have initialized tables that several ranks read

    @property
    def _as_trained(self) -> PerLayerConfig:
        """Returns the settings; with frozen tables if the run does not train PLE."""
        return replace(self.settings, freeze_per_layer_embedding=True) if self.is_frozen else self.settings

    def own_optimizers(
        self, chunks: list[GPTModel], settings: OptimizerSettings, engine: MegatronOptimizer
    ) -> list[OwnOptimizer]:
        """Returns the optimizer of the tables if `--per-layer-sparse` is given and they are not frozen."""
        if not self._as_trained.trains_rows:
            return []
        stages = [stage_module(chunk) for chunk in chunks]
        constants = AdamConstants(settings.adam_beta1, settings.adam_beta2, settings.adam_eps)
        groups = stages[0].groups
        override: ParamGroupOverride = {}
        for found in self.parameter_overrides(settings).values():
            override |= found
        self._rows = RowOptimizer(
            [table for stage in stages for table in stage.tables()],
            UPDATES[self.settings.per_layer_optimizer](constants, groups.tp),
            groups.dp_cp,
            engine,
            dict(override),
            stages[0].memory,
        )
        if self.settings.log_per_layer_stats:
            self._rows.statistics = RowStatistics(self.rows, process_groups.device())
        for stage in stages:
            stage.row_optimizer = self._rows
        return [self._rows]

    def prepare_batches(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Prepares the rows that the step looks up, if tables are trained by rows; returns the batches unchanged."""
        if self._rows is not None:
            self._rows.begin([self.auxiliary_inputs(batch)[PER_LAYER_IDS] for batch in batches])
        return batches

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the per-layer ids [b, s] of a batch; with hashed n-grams [b, s, rows per token].

        Raises:
            ValueError: the batch has no ids, and there is no table to compute them.
        """
        if self.settings.hashes_ngrams:
            numbers = batch[PER_LAYER_IDS] if PER_LAYER_IDS in batch else self._ngrams(batch)
            rows = [function(numbers, self.rows) for function in self._hash_functions]
            return {PER_LAYER_IDS: torch.stack(rows, dim=-1)}
        if PER_LAYER_IDS in batch:
            return {PER_LAYER_IDS: batch[PER_LAYER_IDS]}
        tokens = batch["tokens"]
        if self.settings.uses_token_ids:
            in_table = self.rows == self.vocab_size
            return {PER_LAYER_IDS: tokens if in_table else tokens.where(tokens < self.rows, 0)}
        if self.table is None:
            raise ValueError(
                "the batch has no per_layer_ids; pass --per-layer-vocab-file, from which they can be derived"
            )
        if self.table.device != tokens.device:
            self.table = self.table.to(tokens.device)
        ids = self.table[tokens]
        if self.settings.per_layer_strategy == "attention_guidance":
            # Text without aligned data, such as a prompt, counts as the beginning of one document.
            place = batch["position_ids"]
            ids = ids.masked_fill(place % ATTENTION_PERIOD == 0, SPECIAL["<|attention|>"])
            ids = ids.masked_fill(place == 0, SPECIAL["<|layer_start|>"])
        return {PER_LAYER_IDS: ids}

    def _ngrams(self, batch: Batch) -> torch.Tensor:
        """Returns for each token of a batch the number that identifies the n-gram ending there, [b, s]."""
        strategy, tokens = self.settings.per_layer_strategy, batch["tokens"]
        if PRECEDING_TOKENS in batch:
            tokens = torch.cat([batch[PRECEDING_TOKENS][:, 1 - NGRAM_TOKENS[strategy] :], tokens], dim=1)
        numbers: torch.Tensor = ngram_numbers(tokens, starts_after(tokens, self.eod), strategy)
        return numbers[:, -batch["tokens"].size(1) :]

    def parameter_overrides(self, settings: OptimizerSettings) -> dict[ParamKey, ParamGroupOverride]:
        """Returns what `--per-layer-lr-scale` and `--per-layer-weight-decay` override for all PLE parameters."""
        override: dict[str, Any] = {}
        if self.settings.per_layer_lr_scale != 1.0:
            override["max_lr"] = settings.lr * self.settings.per_layer_lr_scale
            override["min_lr"] = settings.min_lr * self.settings.per_layer_lr_scale
        if self.settings.per_layer_weight_decay is not None:
            override["start_wd"] = override["end_wd"] = self.settings.per_layer_weight_decay
        return {ParamKey(attr="per_layer"): ParamGroupOverride(**override)} if override else {}

    def begin_statistics(self, chunks: list[GPTModel]) -> None:
        """Makes PLE's modules record the values that `statistics` needs."""
        if self._rows is not None and self.settings.log_per_layer_stats:
            self._rows.bring_up_to_date()
        start_recording(chunks)

    def statistics(self, chunks: list[GPTModel]) -> dict[str, float]:
        """Returns the recorded statistics by TensorBoard tag; see `per_layer_statistics`."""
        if self._rows is None:
            return stop_recording(chunks, self.settings)
        self._rows.reduce()
        values = stop_recording(chunks, self.settings)
        if self._rows.statistics is not None:
            width = chunks[0].config.num_layers * self.settings.per_layer_hidden_size
            values |= self._rows.statistics.values(width)
        return values


def _num_ids(settings: PerLayerConfig, table: "npt.ArrayLike | None") -> int | None:
    """Returns the number of per-layer ids in the run's table and aligned data; None if unknown.

    Raises:
        ValueError: a manifest cannot be read.
    """
    found = [] if table is None else [rows_of(np.asarray(table))]
    for prefix in parse_blend(settings.per_layer_data_path or ())[0]:
        manifest = (read_manifest(prefix) or {}).get("per_layer") or {}
        found += [manifest["vocab_size"]] if manifest.get("vocab_size") else []
    return max(found, default=None)


def _check_table(table: torch.Tensor, vocab_size: int, rows: int) -> None:
    if len(table) != vocab_size:
        raise ValueError(
            f"--per-layer-vocab-file: the table is for {len(table)} token ids, but the tokenizer has {vocab_size}; "
            "use the tokenizer with which the table was made"
        )
    if int(table.min()) < 0 or int(table.max()) >= rows:
        raise ValueError(
            f"--per-layer-vocab-size {rows}: too small for per-layer ids up to {int(table.max())}; pass at least "
            f"{int(table.max()) + 1}, or omit the flag"
        )
