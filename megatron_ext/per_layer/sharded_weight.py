"""A weight that every tensor-parallel rank holds a part of, with all that the engine wants to know about it.

The engine's linear layers bring their own; this is for the tables, projections and norm that are used side by side for
all layers of a stage.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.platform import process_groups


class ShardedWeight(torch.nn.Module):
    """Holds `weight`, the local part of a tensor that is split along one dimension."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        shape: tuple[int, ...],
        *,
        dim: int,
        std: float,
        value: float = 0.0,
    ) -> None:
        """Args:
        config: precision of the weight.
        groups: the tensor-parallel group splits the weight.
        shape: of the whole tensor.
        dim: the dimension that is split.
        std: standard deviation of the initial values; 0 leaves `value`.
        value: the constant before anything is drawn.
        """
        super().__init__()
        self.dim = dim
        self.groups = groups
        local = list(shape)
        local[dim] //= groups.tp.size()
        self.weight = torch.nn.Parameter(
            torch.full(local, value, dtype=config.params_dtype, device=process_groups.device())
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=dim, stride=1)
        mark(self.weight, std)

    def forward(self) -> torch.Tensor:
        """The local part. Called, not read: the engine waits in a hook on the call for the updated values to arrive."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight under `{prefix}weight`, split along its dimension."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": self.dim},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )


def mark(parameter: torch.nn.Parameter, std: float) -> None:
    """Marks a parameter as PLE's, and says how it is drawn (see `models.init`; 0 leaves it as it was built)."""
    parameter.per_layer = True  # type: ignore[attr-defined]
    parameter.init_std = std  # type: ignore[attr-defined]


def initial_std(settings: PerLayerConfig, base_std: float, rows: int, columns: int) -> float:
    """Standard deviation of a [rows, columns] projection under `--per-layer-init-method`."""
    if settings.per_layer_init_method == "xavier_normal":
        return (2.0 / (rows + columns)) ** 0.5
    return base_std if settings.per_layer_init_std is None else settings.per_layer_init_std


def initial_table_std(settings: PerLayerConfig, base_std: float, rows: int, columns: int) -> float:
    """Standard deviation of a table under `--per-layer-init-method`."""
    if settings.per_layer_init_method == "zeros":
        return 0.0
    return initial_std(settings, base_std, rows, columns)
