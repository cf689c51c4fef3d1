"""Reads Adam's state from the flat buffers in which Megatron-LM's distributed optimizer saves by default.

In this format (`dp_reshardable`), every rank of the tensor- and pipeline-parallel groups has its own buffers. They
hold the rank's parameters in reverse order. Every parameter starts at a multiple of 64 values, and no parameter
crosses the end of a bucket:

    optimizer.distributed.dp_group_idx_{pipeline rank x tensor ranks + tensor rank}
        .gbuf_idx_0.dtype_{...}.bucket_idx_{b}.{param,exp_avg,exp_avg_sq}       [values of the bucket]

The names of the parameters are not stored. Their places follow from the model, the layout and the order in which the
modules are built, which differs with Transformer Engine. Nothing is read unless the fp32 weights in the buffers equal
the model's weights.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.interop.megatron.megatron_names import Named, Shape
from megatron_ext.interop.megatron.torch_dist_files import TorchDistFiles

_BUFFER = re.compile(
    r"(optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\..*\.bucket_idx_(\d+)\.)exp_avg"
)
_ALIGNMENT = 64
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_TIED_COPY = "output_layer.weight"

# Parameters that tensor-parallel ranks divide along an axis; every rank holds all other parameters completely.
_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
_HALVES = ("linear_fc1.weight", "linear_fc1.bias")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class _Place:
    bucket: str
    """Name of the bucket's tensors, without the last component."""

    start: int
    shape: Shape


class BufferedOptimizer:
    """The optimizer's tensors in buffers, by the names of the model's tensors.

    Args:
        files: the opened checkpoint.
        tensors: name, shape and Megatron-LM name of the model's tensors, from `find_tensors`.
        model: the model's tensors by name.
        arguments: the checkpoint's arguments by name.

    Raises:
        ValueError: the buffers do not fit the model and its layout.
    """

    def __init__(
        self,
        files: TorchDistFiles,
        tensors: list[Named],
        model: Mapping[str, torch.Tensor],
        arguments: Mapping[str, Any],
    ) -> None:
        self._files = files
        self._ranks = int(arguments.get("tensor_model_parallel_size") or 1)
        self._stages = int(arguments.get("pipeline_model_parallel_size") or 1)
        self._gated = bool(arguments.get("swiglu"))
        self._places: dict[tuple[str, int], _Place] = {}
        for norm_first in (
            True,
            False,
        ):  # the orders in which megatron-core's and Transformer Engine's modules are built
            if self._lay_out(tensors, norm_first) and self._equals(tensors, model):
                return
        raise ValueError(
            f"{files.folder}: the buffers of the distributed optimizer (dp_reshardable) do not fit the "
            "model; load the "
            "checkpoint with Megatron-LM and save it with --dist-ckpt-optim-fully-reshardable, or import without "
            "--with-optimizer"
        )

    def read(self, kind: str, tensor: Named) -> torch.Tensor:
        """Returns `param`, `exp_avg` or `exp_avg_sq` of one parameter, unsharded."""
        parts = []
        for rank in range(self._ranks):
            place = self._places[tensor.name, rank]
            values = self._files.read(place.bucket + kind, (place.start,), (math.prod(place.shape),))
            parts.append(values.view(place.shape))
        if tensor.name.endswith(_COLUMNS):
            return torch.cat(parts, dim=1)
        if tensor.name.endswith(_HALVES) and self._gated:
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([*gates, *ups])
        return torch.cat(parts) if tensor.name.endswith(_ROWS + _HALVES) else parts[0]

    def _lay_out(self, tensors: list[Named], norm_first: bool) -> bool:
        """Finds every parameter's place; returns whether all buckets are filled exactly."""
        self._places = {}
        buckets = self._buckets()
        for stage in range(self._stages):
            names = self._of_stage(tensors, stage, norm_first)[::-1]
            for rank in range(self._ranks):
                found = buckets.pop(stage * self._ranks + rank, None)
                if found is None or not self._fill(names, found, rank):
                    return False
        return not buckets

    def _buckets(self) -> dict[int, list[tuple[str, int]]]:
        """Returns name and length of the buckets of each group, in order."""
        found: dict[int, dict[int, tuple[str, int]]] = {}
        for name, stored in self._files.tensors.items():
            match = _BUFFER.fullmatch(name)
            if match is not None and match[3] == "0":
                found.setdefault(int(match[2]), {})[int(match[4])] = (match[1], stored.shape[0])
            elif match is not None:
                return {}  # buffers of virtual stages or of several dtypes are not supported
        return {group: [bucket for _, bucket in sorted(part.items())] for group, part in found.items()}

    def _of_stage(self, tensors: list[Named], stage: int, norm_first: bool) -> list[Named]:
        """Returns a stage's parameters in the order in which its modules are built."""
        layers = 1 + max(int(match[1]) for t in tensors if (match := _LAYER.match(t.name)))
        held, last = layers // self._stages, stage == self._stages - 1

        def is_here(name: str) -> bool:
            match = _LAYER.match(name)
            if match is not None:
                return int(match[1]) // held == stage
            return stage == 0 if name.startswith("embedding.") else last

        def build_order(tensor: Named) -> tuple[int, int]:
            match = _LAYER.match(tensor.name)
            if match is None:
                return (-1 if tensor.name.startswith("embedding.") else layers), 0
            parts = (
                [".input_layernorm.", ".linear_proj."]
                if norm_first
                else [".linear_proj.", ".input_layernorm."]
            )
            order = next((i for i, part in enumerate(parts) if part in tensor.name), len(parts))
            return int(match[1]), order

        here = sorted(
            (t for t in tensors if is_here(t.name)), key=build_order
        )  # the sort is stable: weights stay before biases
        if last and stage > 0 and not any(t.name == _TIED_COPY for t in tensors):
            embedding = next(t for t in tensors if t.name.endswith("word_embeddings.weight"))
            here.append(Named(_TIED_COPY, embedding.shape, "", None))
        return here

    def _fill(self, names: list[Named], buckets: list[tuple[str, int]], rank: int) -> bool:
        """Places parameters into a group's buckets, one after the other."""
        number, offset = 0, 0
        for tensor in names:
            shape = self._shard(tensor)
            start = -(-offset // _ALIGNMENT) * _ALIGNMENT
            if number < len(buckets) and start + math.prod(shape) > buckets[number][1]:
                if buckets[number][1] - offset >= _ALIGNMENT:
                    return False
                number, start = number + 1, 0
            if number >= len(buckets) or start + math.prod(shape) > buckets[number][1]:
                return False
            self._places[tensor.name, rank] = _Place(buckets[number][0], start, shape)
            offset = start + math.prod(shape)
        return number == len(buckets) - 1 and buckets[number][1] - offset < _ALIGNMENT

    def _shard(self, tensor: Named) -> Shape:
        axis = 1 if tensor.name.endswith(_COLUMNS) else 0
        if not tensor.name.endswith(_ROWS + _HALVES + _COLUMNS):
            return tensor.shape
        return tuple(size // self._ranks if i == axis else size for i, size in enumerate(tensor.shape))

    def _equals(self, tensors: list[Named], model: Mapping[str, torch.Tensor]) -> bool:
        for tensor in tensors:
            weight, stored = model[tensor.name], self._files.tensors[tensor.theirs].dtype
            if not torch.equal(self.read("param", tensor).to(stored).to(weight.dtype), weight):
                return False
        return True
