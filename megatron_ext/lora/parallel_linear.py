"""The engine's column- and row-parallel linear layers, extended by LoRA adapters and a selectable precision.

The names of weights do not change: the weight of `linear_qkv` stays `linear_qkv.weight` in every checkpoint, and its
adapters are `linear_qkv.adapters.{name}.A` and `.B`. Without adapters, and in the run's precision, the forward pass
equals the engine's to the bit. These layers replace the engine's own even if the run uses Transformer Engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ext.lora.adapter import LoRAAdapter, add_adapters
from megatron_ext.lora.four_bit_weights import PackedTensors, Part, check_part, is_packed, packing
from megatron_ext.lora.linear_precision import Precision, compute_dtype, mixed_linear
from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.layer_spec import LINEARS


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Adapters, frozen parts and precision of one transformer layer."""

    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    """Adapters of each of the layer's linear modules: maps adapter name to rank and alpha."""

    trained_adapters: frozenset[str] = frozenset()
    """Names of the adapters that train; the others are frozen."""

    trains_base: bool = True
    """Whether the layer's own weights, norms and biases train."""

    precision: Precision | None = None
    """Precision of the layer's linear modules; None for the run's precision."""

    def __post_init__(self) -> None:
        unknown = self.trained_adapters - self.adapters.keys()
        if unknown:
            raise ValueError(
                f"trained_adapters {sorted(unknown)}: the layer has only the adapters {sorted(self.adapters)}"
            )
        if self.trains_base and is_packed(self.precision):
            raise ValueError(
                f"precision {self.precision}: four-bit weights cannot be trained; freeze the layers "
                "with this precision"
            )

    def changes_linears(self, params_dtype: torch.dtype) -> bool:
        """Returns whether a layer with these settings needs this file's linear modules in a run with `params_dtype`."""
        is_other = compute_dtype(self.precision, params_dtype) is not params_dtype
        return bool(self.adapters) or is_other or is_packed(self.precision)


SettingsByLayer = Mapping[int, LayerSettings]
"""Maps a layer's number, from 0 over the whole model, to the layer's settings."""


def linear_modules(settings: LayerSettings) -> dict[str, ModuleSpec]:
    """Returns the specs of a transformer layer's four linear layers, for `Extension.linears`."""
    kinds = (AdaptedColumnParallelLinear, AdaptedRowParallelLinear)  # in the alternating order of LINEARS
    return {
        name: ModuleSpec(module=kinds[number % 2], params={"settings": settings})
        for number, name in enumerate(LINEARS)
    }


class AdaptedLinear(torch.nn.Module):
    """Mixin that gives a linear layer adapters and a precision; list it before the engine's class among the bases."""

    splits_input: bool
    """Whether the layer is row-parallel."""

    def __init__(
        self, input_size: int, output_size: int, *, settings: LayerSettings, stride: int = 1, **kwargs: Any
    ) -> None:
        """Args:
        input_size: input size of the whole layer, over all ranks.
        output_size: output size of the whole layer, over all ranks.
        settings: the layer's adapters and precision.
        stride: 2 if the output is [gate ; up], as in the engine.
        **kwargs: further arguments of the engine's class.
        """
        super().__init__(input_size, output_size, stride=stride, **kwargs)
        self.config: Any
        self.tp_group: Any
        self.weight: torch.nn.Parameter
        self.precision = settings.precision
        self.is_gated = stride == 2
        self.is_stored = False
        """Whether the weight is frozen and stored in the layer's precision."""
        self.weight_scales: torch.Tensor | None
        # The buffer is not persistent, because checkpoints contain plain values; see `_save_to_state_dict`.
        self.register_buffer("weight_scales", None, persistent=False)
        self.weight_shape = self.weight.shape
        self.weight.data = self.weight.data.to(self.trained_dtype)
        adapters = {
            name: LoRAAdapter(
                self.config,
                input_size,
                output_size,
                shape,
                self.tp_group,
                splits_input=self.splits_input,
                is_gated=self.is_gated,
            )
            for name, shape in settings.adapters.items()
        }
        self.adapters = torch.nn.ModuleDict(adapters)

    @property
    def trained_dtype(self) -> torch.dtype:
        """Dtype of the weight while it trains: fp32 with the precision `full`, otherwise the run's dtype."""
        return torch.float32 if self.precision == "full" else self.config.params_dtype

    def store_weight(self) -> None:
        """Freezes the weight and converts it to the layer's precision; call it again after the weight has changed."""
        self.weight.requires_grad_(False)
        if is_packed(self.precision):
            packed = self._pack(self.read_weight(torch.float32))
            self.weight.data, self.weight_scales = packed.codes, packed.scales
        else:
            self.weight.data = self.weight.data.to(compute_dtype(self.precision, self.config.params_dtype))
        self.is_stored = True

    def _pack(self, values: torch.Tensor) -> PackedTensors:
        rows, row = values.shape
        part = Part(rows=rows, row=row, splits_input=self.splits_input, pieces=2 if self.is_gated else 1)
        check_part(str(self.precision), part, self.tp_group.size())
        return packing(str(self.precision)).pack(values)

    def restore_weight(self) -> None:
        """Converts the weight back to a plain, trainable tensor in `trained_dtype`: the inverse of `store_weight`."""
        self.weight.data = self.read_weight(self.trained_dtype)
        self.weight_scales = None
        self.is_stored = False

    def read_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns this rank's part of the weight without adapters, [output(/t), input(/t)], in `dtype`."""
        if self.weight_scales is None:
            return self.weight.detach().to(dtype)
        packed = PackedTensors(self.weight.detach(), self.weight_scales)
        return packing(str(self.precision)).unpack(packed, self.weight_shape, dtype)

    def merge_adapters(self) -> None:
        """Adds the adapters to the weight and removes them; the result is in `trained_dtype`. Not collective."""
        merged = self.read_weight(torch.float32)
        for adapter in self.adapters.values():
            assert isinstance(adapter, LoRAAdapter)
            merged += adapter.delta()
        self.weight_scales, self.is_stored = None, False
        self.weight.data = merged.to(self.trained_dtype)
        self.adapters.clear()

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the layer's output, adapters included, and the bias if the engine's layer returns it separately.

        Shapes are as in `adapter.add_adapters`.
        """
        output, bias = super().forward(input_, *args, **kwargs)
        if len(self.adapters):
            adapters = [adapter for adapter in self.adapters.values() if isinstance(adapter, LoRAAdapter)]
            output = add_adapters(output, input_, adapters, splits_input=self.splits_input)
        return output, bias

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **rest: Any,
    ) -> torch.Tensor:
        # Overrides the engine's product, which requires the same dtype for input and weight.
        dtype = compute_dtype(self.precision, self.config.params_dtype)
        if input.dtype == weight.dtype == dtype:
            return super()._forward_impl(  # type: ignore[misc]
                input=input,
                weight=weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **rest,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        reduce_group = tp_group if allreduce_dgrad else None
        output = mixed_linear(input, weight, self.read_weight, dtype, reduce_group=reduce_group)
        return output if bias is None else output + bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the entries of the engine's linear layer and of its adapters."""
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        # The engine would describe the adapters' split factors as replicated.
        state = {key: value for key, value in base.items() if not key.startswith(f"{prefix}{ADAPTERS}.")}
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, LoRAAdapter)
            state |= adapter.sharded_state_dict(f"{prefix}{ADAPTERS}.{name}.", sharded_offsets, metadata)
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A packed weight is saved as fp32 values under its own name, so that it loads in any precision and layout.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_scales is not None:
            destination[f"{prefix}weight"] = self.read_weight(torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Loads plain values into a packed weight.
        key = f"{prefix}weight"
        if self.weight_scales is not None and key in state_dict:
            packed = self._pack(state_dict[key].to(self.weight.device))
            state_dict[key] = packed.codes
            self.weight_scales = packed.scales
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast of the whole model (`model.bfloat16()`) must not change the dtype of a weight with its own precision;
        # moves between devices still apply.
        if not self.is_stored and self.trained_dtype == self.config.params_dtype:
            return super()._apply(fn, recurse)
        for child in self.children():
            child._apply(fn)
        stored = self.weight
        self._parameters["weight"] = None
        super()._apply(fn, recurse=False)
        self._parameters["weight"] = stored
        moved = fn(stored.data)
        stored.data = moved if moved.dtype == stored.dtype else stored.data.to(moved.device)
        return self


class AdaptedColumnParallelLinear(AdaptedLinear, ColumnParallelLinear):
    """A column-parallel layer (the output is split over the ranks): qkv projection, fc1."""

    splits_input = False


class AdaptedRowParallelLinear(AdaptedLinear, RowParallelLinear):
    """A row-parallel layer (the input is split over the ranks): attention's output projection, fc2."""

    splits_input = True
