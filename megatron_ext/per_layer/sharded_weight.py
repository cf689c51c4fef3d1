"""A weight that is split over the tensor-parallel ranks, with the attributes and shards that the engine needs.

Per-layer embedding (PLE) uses it for tables, projections and the norm, because one operation applies the weights of all
layers of a stage, which the engine's linear layers cannot do.
"""

from collections.abc import Callable
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
        held: torch.Tensor | None = None,
    ) -> None:
        """Args:
        config: the engine's configuration, which specifies the dtype of the weight.
        groups: the weight is split over the tensor-parallel group.
        shape: shape of the whole tensor.
        dim: the dimension that is split.
        std: standard deviation of the initial values; 0 keeps `value`.
        value: constant with which the tensor is filled before initialization.
        held: tensor outside the device's memory, which becomes the local part as it is; None to allocate the part on
            the device.
        """
        super().__init__()
        self.dim = dim
        self.groups = groups
        local = list(shape)
        local[dim] //= groups.tp.size()
        self._is_off_device = held is not None
        if held is None:
            held = torch.full(local, value, dtype=config.params_dtype, device=process_groups.device())
        self.weight = torch.nn.Parameter(held)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=dim, stride=1)
        mark(self.weight, std)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ShardedWeight":
        # `to`, `cuda` and similar methods of a module that contains this one call this method.
        if self._is_off_device:
            return self
        return super()._apply(fn, recurse)

    def forward(self) -> torch.Tensor:
        """Returns the local part.

        Call the module instead of reading `weight`: with --overlap-param-gather a hook on the call waits for the
        updated values.
        """
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the weight under `{prefix}weight`, split along `dim`."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": self.dim},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )


def mark(parameter: torch.nn.Parameter, std: float) -> None:
    """Marks a parameter as PLE's and sets the standard deviation of its initialization (0 keeps its present value)."""
    parameter.per_layer = True  # type: ignore[attr-defined]
    parameter.init_std = std  # type: ignore[attr-defined]


def initial_std(settings: PerLayerConfig, base_std: float, rows: int, columns: int) -> float:
    """Returns the standard deviation of a [rows, columns] projection for `--per-layer-init-method`."""
    if settings.per_layer_init_method == "xavier_normal":
        return (2.0 / (rows + columns)) ** 0.5
    return base_std if settings.per_layer_init_std is None else settings.per_layer_init_std


def initial_table_std(settings: PerLayerConfig, base_std: float, rows: int, columns: int) -> float:
    """Returns the standard deviation of a [rows, columns] table for `--per-layer-init-method`."""
    if settings.per_layer_init_method == "zeros":
        return 0.0
    return initial_std(settings, base_std, rows, columns)
