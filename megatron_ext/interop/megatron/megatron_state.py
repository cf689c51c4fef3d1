"""Reads the tensors of a Megatron-LM checkpoint under the names of this package's checkpoints, one at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.interop.megatron.megatron_buffers import BufferedOptimizer
from megatron_ext.interop.megatron.megatron_names import Named, Shape
from megatron_ext.interop.megatron.torch_dist_files import TorchDistFiles
from megatron_ext.training.checkpoint.optimizer_state import MAIN_PARAM_PREFIX, PREFIX

_READ_AS = {torch.float16: torch.float32}
"""Maps the dtype in a file to the dtype after reading. Training uses fp32 or bf16, so fp16 is converted to fp32,
without rounding.
"""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAIN = ("fp32_param", "param")  # the name in plain optimizers and an old format; the name in new formats


class MegatronState(Mapping[str, torch.Tensor]):
    """Maps this package's names to the tensors of a Megatron-LM checkpoint: the model's and, if asked for, its
    optimizer's.

    Args:
        files: the opened checkpoint.
        tensors: name, shape and Megatron-LM name of the model's tensors, from `find_tensors`.
        arguments: the checkpoint's arguments by name.
        with_optimizer: whether to add Adam's moments and, for a model that is not in fp32, the main weights.

    Raises:
        ValueError: a tensor does not have the shape that the arguments require, or the optimizer's tensors cannot be
            read.
    """

    def __init__(
        self,
        files: TorchDistFiles,
        tensors: list[Named],
        arguments: Mapping[str, Any],
        *,
        with_optimizer: bool = False,
    ) -> None:
        self._files = files
        self._model = {tensor.name: tensor for tensor in tensors}
        num_layers = 1 + max((tensor.layer for tensor in tensors if tensor.layer is not None), default=0)
        for tensor in tensors:
            _check(files, tensor, num_layers)
        self._kinds: dict[str, str] = {}
        self._buffers: BufferedOptimizer | None = None
        if with_optimizer and has_buffers(files):
            self._buffers = BufferedOptimizer(files, tensors, self, arguments)
            self._kinds = {f"{PREFIX}{kind}.": kind for kind in self._needed(tensors)}
        elif with_optimizer:
            self._kinds = self._optimizer_kinds(tensors)

    def _needed(self, tensors: list[Named]) -> tuple[str, ...]:
        """Returns the kinds of tensors that Adam needs; they include fp32 weights if the model is not in fp32."""
        is_fp32 = self._files.tensors[tensors[0].theirs].dtype == torch.float32
        return _MOMENTS if is_fp32 else (*_MOMENTS, "param")

    def _optimizer_kinds(self, tensors: list[Named]) -> dict[str, str]:
        """Returns a map from this package's prefix to Megatron-LM's, for each kind of optimizer tensor."""
        names = self._files.tensors
        main = next((kind for kind in _MAIN if f"{PREFIX}{kind}.{tensors[0].theirs}" in names), None)
        kinds = {f"{PREFIX}{kind}.": f"{PREFIX}{kind}." for kind in _MOMENTS}
        if "param" in self._needed(tensors):
            if main is None:
                raise ValueError(
                    f"{self._files.folder}: contains no fp32 weights of the optimizer; import without "
                    "--with-optimizer"
                )
            kinds[MAIN_PARAM_PREFIX] = f"{PREFIX}{main}."
        for tensor in tensors:
            for theirs in kinds.values():
                if theirs + tensor.theirs not in names:
                    raise ValueError(
                        f"{self._files.folder}: contains no tensor {theirs}{tensor.theirs}; import without "
                        "--with-optimizer"
                    )
        return kinds

    def __getitem__(self, name: str) -> torch.Tensor:
        prefix = next((ours for ours in self._kinds if name.startswith(ours)), "")
        tensor = self._model[name.removeprefix(prefix)]
        read = self._read(tensor, self._kinds.get(prefix, ""))
        return read.to(self.dtype(name))

    def _read(self, tensor: Named, prefix: str) -> torch.Tensor:
        if prefix and self._buffers is not None:
            return self._buffers.read(prefix, tensor)
        stored = self._files.tensors[prefix + tensor.theirs]
        whole = self._files.tensors[tensor.theirs].shape
        # An old format (`fully_sharded_model_space`) divides a tensor into equal blocks and stores [blocks...,
        # values].
        grid = stored.shape[:-1] if stored.shape != whole else None
        lead = len(whole) - len(tensor.shape)  # 1 if the tensor has an axis of layers, otherwise 0
        first = () if tensor.layer is None else (tensor.layer,)
        if grid is None:
            region = (1,) * lead + tensor.shape
            read = self._files.read(prefix + tensor.theirs, first + (0,) * len(tensor.shape), region)
            return read.reshape(tensor.shape)
        rest = stored.shape[lead:]
        read = self._files.read(prefix + tensor.theirs, first + (0,) * len(rest), (1,) * lead + rest)
        return _from_blocks(read.reshape(rest), tensor.shape)

    @property
    def tensors(self) -> list[Named]:
        """The model's tensors, without the optimizer's."""
        return list(self._model.values())

    def __iter__(self) -> Iterator[str]:
        yield from self._model
        for prefix in self._kinds:
            yield from (prefix + name for name in self._model)

    def __len__(self) -> int:
        return len(self._model) * (1 + len(self._kinds))

    def shape(self, name: str) -> Shape:
        """Returns the unsharded shape of a tensor."""
        prefix = next((ours for ours in self._kinds if name.startswith(ours)), "")
        return self._model[name.removeprefix(prefix)].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor after reading."""
        if name not in self._model:
            return torch.float32
        stored = self._files.tensors[self._model[name].theirs].dtype
        return _READ_AS.get(stored, stored)


def _from_blocks(blocks: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Returns a tensor of `shape` from [g1, ..., gn, values]: a grid of g1 x ... x gn flattened blocks."""
    grid = tuple(blocks.shape[:-1])
    block = tuple(size // count for size, count in zip(shape, grid, strict=True))
    axes = len(shape)
    split = blocks.reshape(*grid, *block)
    order = [axis for pair in range(axes) for axis in (pair, axes + pair)]
    return split.permute(order).reshape(shape)


def _check(files: TorchDistFiles, tensor: Named, num_layers: int) -> None:
    stored = files.tensors[tensor.theirs]
    if stored.dtype not in _DTYPES:
        raise ValueError(
            f"{files.folder}: tensor {tensor.theirs} is of type {stored.dtype}; save the model in bf16"
        )
    expected = tensor.shape if tensor.layer is None else (num_layers, *tensor.shape)
    if stored.shape != expected:
        raise ValueError(
            f"{files.folder}: tensor {tensor.theirs} has shape {list(stored.shape)}, but the checkpoint's arguments "
            f"describe {list(expected)}"
        )


def has_buffers(files: TorchDistFiles) -> bool:
    """Returns whether the optimizer is saved in its flat buffers (`dp_reshardable`)."""
    return any(name.startswith("optimizer.distributed.") for name in files.tensors)


def check_optimizer_format(files: TorchDistFiles, folder: Path) -> None:
    """Raises `ValueError` if the optimizer's tensors are in a format that cannot be read."""
    if has_buffers(files) or any(name.startswith(f"{PREFIX}{_MOMENTS[0]}.") for name in files.tensors):
        return
    if any(name.startswith("chained_") for name in files.tensors):
        raise ValueError(
            f"{folder}: has several optimizers, which cannot be read; import without --with-optimizer"
        )
    if any(name.startswith("optimizer.distributed.") for name in files.objects):
        raise ValueError(
            f"{folder}: the optimizer is saved in the format dp_zero_gather_scatter, which cannot be read; load it "
            "with Megatron-LM and save it with --dist-ckpt-optim-fully-reshardable, or import without "
            "--with-optimizer"
        )
    raise ValueError(f"{folder}: contains no optimizer state; import without --with-optimizer")
