"""Weights in four bits: NF4 (QLoRA trunks) and NVFP4, packed and unpacked by libraries, here put into plain bytes.

    qlora    NF4 (arXiv 2305.14314): 16 quantiles of the normal distribution, one fp32 scale for 64 weights that follow
             one another in a row-major matrix. bitsandbytes, on CPU and CUDA.                   4.5 bits a weight
    nvfp4    4-bit floats (E2M1), one E4M3 scale for 16 weights and one fp32 scale for the matrix. torchao, in torch
             operations that run on CPU and CUDA.                                                4.5 bits a weight

Both store weights only: a product unpacks them and is computed in the run's precision. No product in four bits is done,
so NVFP4 saves memory on every machine and time on none.

Packing what was unpacked (in fp32) gives the same bytes again. So a checkpoint holds the plain values under the
weight's own name, can be loaded into a layer of any precision and at any parallel layout, and a resumed run has the
very weights it left. Scales belong to this rank's part of the matrix, and a cut may not go through a block
(`check_part`): the weights would differ from those of a single process by a tenth of their norm. NVFP4's one fp32
scale is a power of two, so that of a part gives the values of the whole matrix.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class PackedTensors:
    """A packed matrix in bytes, so that no cast of a module to another precision touches them."""

    codes: torch.Tensor
    """Two weights a byte, uint8."""

    scales: torch.Tensor
    """The scales' bytes, uint8."""


class Packing(Protocol):
    """A four-bit format."""

    block_size: int
    """Weights of a row-major matrix that follow one another and share a scale."""

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]."""
        ...

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The matrix's values in `dtype`."""
        ...


class NF4:
    """bitsandbytes' 4-bit NormalFloat, without double quantization.

    The library is given vectors: on a CPU it unpacks a matrix wrongly where 64 does not divide a row (0.50.2).
    """

    block_size = 64

    def __init__(self) -> None:
        self._library = _load("bitsandbytes.functional", "qlora", "bitsandbytes")
        self._code = self._library.get_4bit_type("nf4", device=torch.device("cpu"))

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]; scales are fp32."""
        values = weight.detach().float().flatten()
        codes, state = self._library.quantize_4bit(values, blocksize=self.block_size, quant_type="nf4")
        return PackedTensors(codes, state.absmax.view(torch.uint8))

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The matrix's values in `dtype`."""
        state = self._library.QuantState(
            absmax=packed.scales.view(torch.float32),
            shape=torch.Size([shape.numel()]),
            code=self._code.to(packed.codes.device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype,
        )
        return self._library.dequantize_4bit(packed.codes, state).view(shape)


class NVFP4:
    """torchao's NVFP4 with two levels of scales."""

    block_size = 16

    def __init__(self) -> None:
        self._library = _load("torchao.prototype.mx_formats.nvfp4_tensor", "nvfp4", "torchao")

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]; 16 must divide the input."""
        values = weight.detach().float().contiguous()
        # The library's own scale, largest / 2688, rounded up to a power of two: then packing again changes nothing.
        largest = self._library.per_tensor_amax_to_scale(values.abs().max())
        mantissa, exponent = torch.frexp(largest.clamp(min=2.0**-100))
        whole = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
        tensor = self._library.NVFP4Tensor.to_nvfp4(values, per_tensor_scale=whole)
        scales = torch.cat([whole.view(1).view(torch.uint8), tensor.scale.reshape(-1).view(torch.uint8)])
        return PackedTensors(tensor.qdata.view(torch.uint8), scales)

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The matrix's values in `dtype`."""
        scales = packed.scales[4:].view(torch.float8_e4m3fn).view(shape[0], shape[1] // self.block_size)
        whole = packed.scales[:4].view(torch.float32).view(())
        codes = packed.codes.view(shape[0], shape[1] // 2)
        tensor = self._library.NVFP4Tensor(
            codes, scales, self.block_size, torch.float32, per_tensor_scale=whole
        )
        return tensor.dequantize(dtype)


_PACKINGS: dict[str, type[NF4] | type[NVFP4]] = {"qlora": NF4, "nvfp4": NVFP4}
_made: dict[str, Packing] = {}


def packing(precision: str) -> Packing:
    """The four-bit format that a precision stands for.

    Raises:
        ValueError: its library is not installed.
    """
    if precision not in _made:
        _made[precision] = _PACKINGS[precision]()
    return _made[precision]


def is_packed(precision: str | None) -> bool:
    """True for a precision whose frozen weights are stored in four bits."""
    return precision in _PACKINGS


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor-parallel rank's part of a linear layer's matrix, [rows, row]."""

    rows: int
    """Outputs of the part."""

    row: int
    """Inputs of the part."""

    splits_input: bool
    """The ranks share the input (row-parallel), else the output."""

    pieces: int = 1
    """Parts of the output that are split over the ranks each by itself: 2 for [gate ; up]."""


def check_part(precision: str, part: Part, ranks: int) -> None:
    """Raises `ValueError` where a format's blocks do not fit a rank's part of a matrix.

    Args:
        precision: one that is packed.
        part: of each rank.
        ranks: tensor-parallel size.
    """
    block = packing(precision).block_size
    where = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
    if precision == "nvfp4" and part.row % block:
        raise ValueError(
            f"precision {precision}: {block} must divide a linear layer's input, which is {part.row}{where}"
        )
    together = part.row if part.splits_input else part.rows // part.pieces * part.row
    if ranks > 1 and together % block:
        raise ValueError(
            f"precision {precision}: blocks of {block} weights would be cut, a row has {together}{where}; "
            "choose another --tensor-model-parallel-size, or sizes that it leaves a multiple of the block"
        )


def _load(module: str, precision: str, package: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"precision {precision}: needs {package}, which cannot be imported ({error}); "
            "pip install 'megatron-ext[quantization]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both libraries report kernels for other machines that they do without, and warn of their own imports."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
