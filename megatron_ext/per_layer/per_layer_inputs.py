"""The module that per-layer embedding (PLE) adds to a pipeline stage; it computes the vectors of the stage's layers.

Its output is the stream `per_layer` [L, s, b, p / t], where L is the number of layers of the stage. Its inputs are the
word embedding [s, b, h], which travels from stage to stage, and the per-layer ids [b, s], which every stage gets from
its data iterator. Every tensor-parallel rank has the whole sequence, even under sequence parallelism: the word
embedding is gathered once per stage. The formulas are in `combination`.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_ext.models.gpt_model import WORD_EMBEDDING
from megatron_ext.models.model_extension import StageInfo, StageModule
from megatron_ext.per_layer.combination import gather_parts, look_up, multiply, norm_across_shards, project
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_cost import off_device_bytes
from megatron_ext.per_layer.sharded_weight import ShardedWeight, initial_std, initial_table_std
from megatron_ext.per_layer.sparse.row_optimizer import RowOptimizer
from megatron_ext.per_layer.sparse.table_memory import OffDevice, TableMemory
from megatron_ext.per_layer.statistics_recorder import Recorder

PER_LAYER_STREAM = "per_layer"
"""Name of the auxiliary stream that carries the per-layer vectors to the layers."""

PER_LAYER_IDS = "per_layer_ids"
"""Name of the auxiliary input with the integer per-layer ids [b, s], or [b, s, j] for j rows per token."""


class PerLayerWeights(torch.nn.Module):
    """One layer's weights: table, context projection and, for concat and gated, the matrix that combines both."""

    def __init__(
        self,
        config: TransformerConfig,
        settings: PerLayerConfig,
        groups: ProcessGroupCollection,
        rows: int,
        table: torch.Tensor | None,
        *,
        initializes: bool,
    ) -> None:
        super().__init__()
        width, hidden, std = settings.per_layer_hidden_size, config.hidden_size, config.init_method_std
        table_std = initial_table_std(settings, std, rows, width) if initializes else 0.0
        self.embedding = ShardedWeight(config, groups, (rows, width), dim=1, std=table_std, held=table)
        context_std = initial_std(settings, std, width, hidden)
        self.context_projection = ShardedWeight(config, groups, (width, hidden), dim=0, std=context_std)
        if settings.per_layer_combination_method != "scaled_add":
            combination_std = initial_std(settings, std, width, 2 * width)
            self.combination = ShardedWeight(config, groups, (width, 2 * width), dim=0, std=combination_std)


class PerLayerInputs(StageModule):
    """Computes the per-layer vectors of a stage's layers."""

    def __init__(
        self,
        config: TransformerConfig,
        settings: PerLayerConfig,
        stage: StageInfo,
        groups: ProcessGroupCollection,
        rows: int,
    ) -> None:
        """Args:
        config: the engine's configuration.
        settings: PLE's configuration.
        stage: the layers of this stage, and whether the shared norm is counted and saved on this stage.
        groups: the process groups; p is split over the tensor-parallel group.
        rows: Vp, the number of rows of every table.
        """
        super().__init__()
        self.config, self.settings, self.stage, self.groups = config, settings, stage, groups
        width, layers = settings.per_layer_hidden_size, len(stage.layer_numbers)
        self.memory = TableMemory()
        """The memory that holds the tables."""

        tables: list[torch.Tensor | None] = [None] * layers
        if settings.per_layer_offload is not None:
            settings.check_directory()
            shape = (rows, width // groups.tp.size())
            needed = off_device_bytes(settings, rows, layers, shape[1], config.params_dtype.itemsize)
            self.memory = OffDevice(settings.per_layer_offload_dir, groups.dp_cp, needed)
            tables = [*self.memory.zeros(layers, shape, config.params_dtype)]
        self.layers = torch.nn.ModuleList(
            PerLayerWeights(config, settings, groups, rows, table, initializes=self.memory.is_writer)
            for table in tables
        )
        self.norm = ShardedWeight(config, groups, (width,), dim=0, std=0.0, value=1.0)
        _mark_replicated(self.norm.weight, is_owner=stage.owns_replicas)
        # A sum of j independent rows has sqrt(j) times the size of one.
        self.token_scale = settings.per_layer_embed_scale * (width / settings.rows_per_token) ** 0.5
        self.recorder: Recorder | None = None
        self.row_optimizer: RowOptimizer | None = None
        """Trains the tables by rows (--per-layer-sparse); None if the engine trains the tables, or if they are
        frozen.
        """

    def forward(
        self, auxiliary_inputs: dict[str, torch.Tensor], travelling: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Computes the stream `per_layer`; without ids, this is only the projected word embedding.

        Args:
            auxiliary_inputs: `per_layer_ids` [b, s] or [b, s, j], or empty.
            travelling: `word_embedding` [s, b, h] ([s / t, b, h] under sequence parallelism).

        Returns:
            `per_layer`: [L, n, p / t] with n = s * b.
        """
        embedding = self._whole_sequence(travelling[WORD_EMBEDDING])
        projected = project(embedding, [layer.context_projection() for layer in self.weights()])
        ids = auxiliary_inputs.get(PER_LAYER_IDS)
        if ids is None:
            return {PER_LAYER_STREAM: self._normed(projected, scale=1.0)}
        return {PER_LAYER_STREAM: self._combine(projected, self._look_up(ids.transpose(0, 1)))}

    def weights(self) -> list[PerLayerWeights]:
        """Returns the weights of the stage's layers, in order."""
        return cast(list[PerLayerWeights], list(self.layers))

    def tables(self) -> list[torch.nn.Parameter]:
        """Returns the tables of the stage's layers, in order."""
        return [layer.embedding.weight for layer in self.weights()]

    def freeze_tables(self) -> None:
        """Makes the engine compute no gradients of the per-layer embedding tables."""
        for table in self.tables():
            table.requires_grad_(False)

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.row_optimizer
        if rows is None or not (rows.is_in_step() and torch.is_grad_enabled()):
            return look_up(*self.memory.to_look_up(ids, [layer.embedding() for layer in self.weights()]))
        return look_up(rows.places(ids), [rows.inputs(table) for table in self.tables()])

    def _whole_sequence(self, embedding: torch.Tensor) -> torch.Tensor:
        # Each rank computes its part of p from the complete [s, b, h]; both functions sum the gradients over the
        # ranks.
        if self.groups.tp.size() == 1:
            return embedding
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(embedding, group=self.groups.tp)
        return copy_to_tensor_model_parallel_region(embedding, group=self.groups.tp)

    def _normed(self, projected: torch.Tensor, scale: float) -> torch.Tensor:
        # RMSNorm(x * h**-0.5) with eps equals RMSNorm(x) with h * eps; the second form saves the multiplication.
        eps = self.config.layernorm_epsilon * self.config.hidden_size
        return norm_across_shards(projected, self.norm(), eps, scale=scale, group=self.groups.tp)

    def _combine(self, projected: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Combines the projection [n, L * q] and unscaled table rows [L, n, q] to [L, n, q]."""
        if self.settings.per_layer_combination_method == "scaled_add":
            context = self._normed(projected, scale=0.5**0.5)
            combined = torch.add(context, token, alpha=self.token_scale * 0.5**0.5)
            if self.recorder is not None:
                self.recorder.add_parts(context, token, self.token_scale * 0.5**0.5)
            return combined
        context, token = self._normed(projected, scale=1.0), token * self.token_scale
        weights = [layer.combination() for layer in self.weights()]
        mixed = multiply(gather_parts(context, token, self.groups.tp), weights)
        if self.settings.per_layer_combination_method == "concat":
            return mixed
        gate = torch.sigmoid(mixed)
        if self.recorder is not None:
            self.recorder.add_mean("combination_gate", gate)
        return torch.lerp(context, token, gate)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Maps the names of `state_dict` to names that are the same in every parallel layout.

        These are `{prefix}layers.{number in the whole model}.*` and `{prefix}norm.weight`.
        """
        state: dict[str, Any] = {}
        for place, (number, layer) in enumerate(zip(self.stage.layer_numbers, self.weights(), strict=True)):
            for name, part in cast(Iterator[tuple[str, ShardedWeight]], layer.named_children()):
                own, in_model = (f"{prefix}layers.{index}.{name}." for index in (place, number))
                shards = part.sharded_state_dict(in_model, sharded_offsets, metadata)
                state |= {own + key.removeprefix(in_model): shard for key, shard in shards.items()}
        # Only the norm weight of the first stage is saved; the weights of later stages are its replicas.
        replica = (self.stage.layer_numbers[0], 0, self.groups.dp_cp.rank())
        key = f"{prefix}norm.weight"
        state[key] = make_tp_sharded_tensor_for_checkpoint(
            self.norm.weight,
            key,
            0,
            replica_id=replica,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )
        return state


def stage_module(model: torch.nn.Module) -> PerLayerInputs:
    """Returns PLE's stage module in a model chunk."""
    return cast(PerLayerInputs, model.get_submodule("per_layer"))


def _mark_replicated(weight: torch.nn.Parameter, *, is_owner: bool) -> None:
    # With this attribute, the engine sums the weight's gradient over the stages, and counts it once in the gradient
    # norm.
    weight.pipeline_parallel = True  # type: ignore[attr-defined]
    weight.shared = not is_owner  # type: ignore[attr-defined]
    # With this attribute, the engine puts the weight into a separate gradient bucket. Then every stage splits the
    # weight in the same way over the distributed optimizer's ranks, so that the sum over stages adds the same
    # elements.
    weight.shared_embedding = True  # type: ignore[attr-defined]
