"""Packs and unpacks four-bit weights. The two precisions, their formats and the libraries that implement them:

    qlora    NF4 (arXiv 2305.14314): 16 quantiles of the normal distribution, one fp32 scale per block of 64
             consecutive weights in row-major order. bitsandbytes, on CPU and CUDA.              4.5 bits per weight
    nvfp4    4-bit floats (E2M1), one E4M3 scale per block of 16 weights and one fp32 scale per matrix. torchao, in
             torch operations that run on CPU and CUDA.                                          4.5 bits per weight

Only storage is in four bits: a matrix product unpacks the weights and is computed in the run's precision. Therefore
both formats save memory but no time, even on hardware that supports NVFP4.

Unpacking to fp32 and packing again gives the same bytes. A checkpoint therefore stores plain values under the weight's
own name, loads into a layer of any precision in any parallel layout, and restores exactly the weights that were saved.
Tensor parallelism must not split a block (`check_part`); otherwise the weights would differ from those of a single
process by a tenth of their norm.
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
    """A packed matrix, stored as bytes so that casting a module to another dtype does not change it."""

    codes: torch.Tensor
    """Two weights per byte, uint8."""

    scales: torch.Tensor
    """The bytes of the scales, uint8."""


class Packing(Protocol):
    """A four-bit format."""

    block_size: int
    """Number of consecutive weights, in row-major order, that share a scale."""

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]."""
        ...

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Returns the matrix [output, input] in `dtype`."""
        ...


class NF4:
    """bitsandbytes' 4-bit NormalFloat, without double quantization."""

    block_size = 64

    def __init__(self) -> None:
        self._library = _load("bitsandbytes.functional", "qlora", "bitsandbytes")
        self._codes: dict[torch.device, torch.Tensor] = {}

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]; scales are fp32."""
        # Flatten the matrix, because on a CPU bitsandbytes 0.50.2 unpacks a matrix wrongly if the length of its rows
        # is not a multiple of 64.
        values = weight.detach().float().flatten()
        codes, state = self._library.quantize_4bit(values, blocksize=self.block_size, quant_type="nf4")
        return PackedTensors(codes, state.absmax.view(torch.uint8))

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Returns the matrix [output, input] in `dtype`."""
        state = self._library.QuantState(
            absmax=packed.scales.view(torch.float32),
            shape=torch.Size([shape.numel()]),
            code=self._code_on(packed.codes.device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype,
        )
        return self._library.dequantize_4bit(packed.codes, state).view(shape)

    def _code_on(self, device: torch.device) -> torch.Tensor:
        """Returns the 16 values of the format; they are copied to a device once."""
        if device not in self._codes:
            self._codes[device] = self._library.get_4bit_type("nf4", device=device)
        return self._codes[device]


class NVFP4:
    """torchao's NVFP4 with two levels of scales."""

    block_size = 16

    def __init__(self) -> None:
        self._library = _load("torchao.prototype.mx_formats.nvfp4_tensor", "nvfp4", "torchao")

    def pack(self, weight: torch.Tensor) -> PackedTensors:
        """Packs a matrix [output, input]; the input size must be a multiple of 16."""
        values = weight.detach().float().contiguous()
        # The library's scale, largest / 2688, is rounded up to a power of two. As a result, packing the unpacked
        # values changes nothing, and a rank's part of a matrix has the same values as in the whole matrix.
        largest = self._library.per_tensor_amax_to_scale(values.abs().max())
        mantissa, exponent = torch.frexp(largest.clamp(min=2.0**-100))
        whole = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
        tensor = self._library.NVFP4Tensor.to_nvfp4(values, per_tensor_scale=whole)
        scales = torch.cat([whole.view(1).view(torch.uint8), tensor.scale.reshape(-1).view(torch.uint8)])
        return PackedTensors(tensor.qdata.view(torch.uint8), scales)

    def unpack(self, packed: PackedTensors, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Returns the matrix [output, input] in `dtype`."""
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
    """Returns the four-bit format of a precision, `qlora` or `nvfp4`.

    Raises:
        ValueError: the library that implements the format is not installed.
    """
    if precision not in _made:
        _made[precision] = _PACKINGS[precision]()
    return _made[precision]


def is_packed(precision: str | None) -> bool:
    """Returns whether a precision stores frozen weights in four bits."""
    return precision in _PACKINGS


@dataclass(frozen=True, kw_only=True)
class Part:
    """The size of a tensor-parallel rank's part of a linear layer's matrix: `rows` rows of `row` values each."""

    rows: int
    """Number of outputs of this part."""

    row: int
    """Number of inputs of this part, which is the length of a row."""

    splits_input: bool
    """Whether ranks split the input (row-parallel layer); otherwise they split the output."""

    pieces: int = 1
    """Number of sections of the output, each of which is split over the ranks: 2 for [gate ; up]."""


def check_part(precision: str, part: Part, ranks: int) -> None:
    """Checks that a rank's part of a matrix consists of whole blocks (weights that share a scale).

    Args:
        precision: `qlora` or `nvfp4`.
        part: a rank's part of the matrix; all ranks have parts of the same size.
        ranks: tensor-parallel size.

    Raises:
        ValueError: a block would cross the border of a row (nvfp4) or of a rank's part.
    """
    block = packing(precision).block_size
    where = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
    if precision == "nvfp4" and part.row % block:
        raise ValueError(
            f"precision {precision}: a linear layer's input size must be a multiple of {block}, but it is "
            f"{part.row}{where}"
        )
    together = part.row if part.splits_input else part.rows // part.pieces * part.row
    if ranks > 1 and together % block:
        raise ValueError(
            f"precision {precision}: tensor parallelism would split blocks of {block} weights, because the matrix has "
            f"{together} consecutive weights{where}, which is not a multiple of {block}; choose another "
            "--tensor-model-parallel-size, or layer sizes that keep blocks whole"
        )


def _load(module: str, precision: str, package: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"precision {precision} requires {package}, which cannot be imported ({error}); "
            "pip install 'megatron-ext[quantization]'"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # During import, both libraries log missing kernels for other hardware and warn about their own dependencies.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
