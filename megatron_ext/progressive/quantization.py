"""Weights in four bits: NF4 (QLoRA trunks) and NVFP4, packed and unpacked by libraries, here put into plain bytes.

    qlora    NF4 (arXiv 2305.14314): 16 quantiles of the normal distribution, one fp32 scale for 64 weights that follow
             one another in a row-major matrix. bitsandbytes, on CPU and CUDA.                   4.5 bits a weight
    nvfp4    4-bit floats (E2M1), one E4M3 scale for 16 weights and one fp32 scale for the matrix. torchao, in torch
             operations that run on CPU and CUDA.                                                4.5 bits a weight

Both store weights only: a product unpacks them and is computed in the run's precision. No product in four bits is done,
so NVFP4 saves memory on every machine and time on none.

Packing what was unpacked (in fp32) gives the same bytes again. So a checkpoint holds the plain values under the
weight's own name, can be loaded into a layer of any precision and at any cut, and a resumed run has the very weights it
left. Scales belong to this rank's part of the matrix. NF4 does not depend on the cut where 64 divides a row of that
part; NVFP4 has its one fp32 scale from this rank's part.
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
        """Packs a matrix [output, input]; 16 must divide the input.

        Raises:
            ValueError: 16 does not divide this rank's part of a row.
        """
        if weight.size(1) % self.block_size:
            raise ValueError(
                f"precision nvfp4: {self.block_size} must divide a linear layer's input on each tensor-parallel rank, "
                f"which is {weight.size(1)}"
            )
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
