"""LoRA adapters of a tensor-parallel linear layer with the weight W.

    y = W x + sum over adapters of (alpha / r) B A x             A: [r, input], B: [output, r]   (arXiv 2106.09685)

A is initialized from U(-1/sqrt(input), 1/sqrt(input)) (Kaiming, as in `peft`), where `input` is the input size of the
whole layer, whatever the parallel layout; B is zero. There is no dropout. The factors are split over tensor-parallel
ranks as follows:

    column-parallel W    A is replicated on every rank; B is split over the output like W. `A x` is computed first.
                         Then megatron-core copies it to the tensor-parallel region (backward: all-reduce) or, under
                         sequence parallelism, gathers it (backward: reduce-scatter). Therefore the gradient that
                         reaches A is already summed over the ranks. If x were copied instead, as in the base layer,
                         each rank would hold only its share of A's gradient.
    row-parallel W       A is split over the input like W; the ranks' products with A are summed, and under sequence
                         parallelism also scattered. B is replicated on every rank.

All adapters of a linear layer share one collective and two matrix products: their factors are concatenated.
Source: docs/design/progressive_growth.md.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.platform import process_groups


class LoRAAdapter(MegatronModule):
    """This rank's part of the factors A and B, for one adapter of one linear layer."""

    def __init__(
        self,
        config: TransformerConfig,
        input_size: int,
        output_size: int,
        shape: AdapterShape,
        tp_group: Any,
        *,
        splits_input: bool,
        is_gated: bool = False,
    ) -> None:
        """Args:
        config: the engine's configuration, which specifies the dtype and sequence parallelism.
        input_size: input size of the whole linear layer, over all ranks.
        output_size: output size of the whole linear layer, over all ranks.
        shape: the adapter's rank and alpha.
        tp_group: the tensor-parallel group.
        splits_input: whether the base layer is row-parallel; otherwise it is column-parallel.
        is_gated: whether the output is [gate ; up]; each half is then split over the ranks separately.
        """
        super().__init__(config)
        self.shape = shape
        self.tp_group = tp_group
        self.is_gated = is_gated
        self.split_dims = {"A": 1} if splits_input else {"B": 0}
        """Maps the split factor's name to the dimension that is split over ranks; the other factor is replicated."""
        self._add_factor("A", [shape.rank, input_size])
        self.A.init_uniform = input_size**-0.5
        self._add_factor("B", [output_size, shape.rank])
        self.B.init_std = 0.0

    def _add_factor(self, name: str, shape: list[int]) -> None:
        split = self.split_dims.get(name)
        if split is not None:
            shape[split] //= self.tp_group.size()
        values = torch.zeros(shape, dtype=self.config.params_dtype, device=process_groups.device())
        factor = torch.nn.Parameter(values)
        if split is not None:
            set_tensor_model_parallel_attributes(factor, True, split, 2 if self.is_gated else 1)
        else:
            # The gradient of a replicated factor covers only this rank's rows; with this attribute, the engine sums
            # the gradient over the ranks.
            factor.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, factor)

    def delta(self) -> torch.Tensor:
        """Returns this rank's part of the adapter's weight delta (alpha / r) B A, in fp32."""
        return self.shape.scale * (self.B.float() @ self.A.float())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the factors under `{prefix}A` and `{prefix}B`; they can be loaded at any tensor-parallel size."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if self.is_gated:
            state[f"{prefix}B"] = apply_swiglu_sharded_factory(state[f"{prefix}B"], sharded_offsets)
        return state


def add_adapters(
    output: torch.Tensor, x: torch.Tensor, adapters: Iterable[LoRAAdapter], *, splits_input: bool
) -> torch.Tensor:
    """Adds the adapters' contributions to the output of the base layer.

    Args:
        output: the base layer's output, [s, b, output(/t)]; [s/t, b, output] for a row-parallel layer under sequence
            parallelism.
        x: the base layer's input, [s, b, input(/t)]; [s/t, b, input] for a column-parallel layer under sequence
            parallelism.
        adapters: the layer's adapters; at least one.
        splits_input: whether the base layer is row-parallel.

    Returns:
        The sum, in the shape of `output`.
    """
    adapters = list(adapters)
    # The factors of all adapters are concatenated along r: one product with A and one with B for all of them.
    products = F.linear(x, _joined([adapter.A for adapter in adapters], 0))
    group, sequence_parallel = adapters[0].tp_group, adapters[0].config.sequence_parallel
    if group.size() > 1:
        if splits_input:
            to_all = (
                reduce_scatter_to_sequence_parallel_region
                if sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
        else:
            to_all = (
                gather_from_sequence_parallel_region
                if sequence_parallel
                else copy_to_tensor_model_parallel_region
            )
        products = to_all(products, group=group)
    factor = _joined([adapter.shape.scale * adapter.B for adapter in adapters], 1)
    rows = torch.addmm(output.flatten(0, -2), products.flatten(0, -2), factor.t())
    return rows.view_as(output)


def _joined(factors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, dim=dim)
