"""Finds the peak FLOP rate of this process's device, from which model FLOPs utilization (MFU) is computed.

    MFU = model FLOPs per second / peak FLOPs per second

For a known NVIDIA GPU the peak is the vendor's figure for dense matrix products in the run's precision. For any other
device, such as a CPU, the peak is measured: the best rate of a few large matrix products with this process's threads. A
measurement on a busy machine is too low; `DevicePeak.raised` corrects it if a run turns out to be faster.
"""

import functools
import re
import time
from dataclasses import dataclass, replace

import torch

from megatron_ext.config.groups.training_config import Precision

_MEASURE_SECONDS = 0.15
_ROUNDS, _PAUSE_SECONDS = 3, 0.1
_CPU_SIZES = (512, 1024)
_CUDA_SIZES = (2048, 8192)

_TFLOPS: dict[tuple[str, ...], tuple[float, float, float]] = {
    # words in the device's name -> dense TFLOP/s in bf16, tf32, fp32; more specific names first
    ("B200",): (2250.0, 1125.0, 75.0),
    ("GH200",): (989.4, 494.7, 66.9),
    ("H200",): (989.4, 494.7, 66.9),
    ("H100", "PCIe"): (756.0, 378.0, 51.2),
    ("H100", "NVL"): (835.0, 417.5, 60.0),
    ("H100",): (989.4, 494.7, 66.9),
    ("H800",): (989.4, 494.7, 66.9),
    ("H20",): (148.0, 74.0, 44.0),
    ("A100",): (312.0, 156.0, 19.5),
    ("A800",): (312.0, 156.0, 19.5),
    ("A40",): (149.7, 74.8, 37.4),
    ("A30",): (165.0, 82.0, 10.3),
    ("A10",): (125.0, 62.5, 31.2),
    ("L40S",): (362.0, 183.0, 91.6),
    ("L40",): (181.0, 90.5, 90.5),
    ("L4",): (121.0, 60.0, 30.3),
}


@dataclass(frozen=True)
class DevicePeak:
    """A device's peak rate, and the source of the figure."""

    flops_per_second: float
    """FLOP/s of one GPU, or of one process on a CPU."""

    source: str
    """Description of the figure's source, for the log."""

    dtype: torch.dtype | None = None
    """Precision of the measured matrix products; None if the figure was not measured."""

    def raised(self, flops_per_second: float) -> "DevicePeak":
        """Returns this peak, corrected if it was measured and a run has been faster.

        It is then measured again, which takes less than a second; the result is at least the run's rate. A peak given
        by the user or by the vendor is returned unchanged.

        Args:
            flops_per_second: FLOP/s that the run has reached.
        """
        if self.dtype is None or flops_per_second <= self.flops_per_second:
            return self
        return replace(self, flops_per_second=max(flops_per_second, _measure(self.dtype)))


def device_peak(precision: Precision, tflops: float | None = None) -> DevicePeak:
    """Returns the peak FLOP rate of this process's device.

    A device that is not in the table of known GPUs is measured once per process, in less than a second. Processes that
    share a CPU should measure at the same time, so that each measures its share.

    Args:
        precision: precision of the products. For fp32, the peak of TF32 is returned if torch allows TF32.
        tflops: the user's figure in TFLOP/s, which replaces all others; None if there is none.
    """
    if tflops is not None:
        return DevicePeak(tflops * 1e12, "given")
    if torch.cuda.is_available():
        # GPUs multiply as fast in fp16 as in bfloat16.
        fp32 = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
        name, column = torch.cuda.get_device_name(), fp32 if precision == "fp32" else "bf16"
        known = known_tflops(name, column)
        if known is not None:
            return DevicePeak(known * 1e12, f"{name}, {column}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return DevicePeak(measured_flops(dtype), f"measured matrix product, {precision}", dtype)


def known_tflops(device_name: str, precision: str) -> float | None:
    """Returns the vendor's figure for an NVIDIA GPU in dense TFLOP/s; None if the GPU is not in the table.

    Args:
        device_name: result of `torch.cuda.get_device_name`, for example `NVIDIA A100-SXM4-80GB`.
        precision: `bf16`, `tf32` or `fp32`.
    """
    words = set(re.split(r"[\s\-]+", device_name))
    column = ("bf16", "tf32", "fp32").index(precision)
    for key, figures in _TFLOPS.items():
        if words.issuperset(key):
            return figures[column]
    return None


@functools.cache
def measured_flops(dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest square matrix product on this process's device; measured once per process."""
    return _measure(dtype)


def _measure(dtype: torch.dtype) -> float:
    """Returns the best rate of several measurement rounds, in FLOP/s."""
    # Pause between rounds, so that a short load on the machine spoils only one round.
    rates = [_measured_round(dtype)]
    for _ in range(_ROUNDS - 1):
        time.sleep(_PAUSE_SECONDS)
        rates.append(_measured_round(dtype))
    return max(rates)


def _measured_round(dtype: torch.dtype) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, large = _CUDA_SIZES if device.type == "cuda" else _CPU_SIZES
    rate = _best_rate(small, dtype, device, _MEASURE_SECONDS / 4)
    # bfloat16 is slow without hardware support, so try the large product only if about three of them fit into the
    # time.
    if 3 * 2.0 * large**3 / rate < _MEASURE_SECONDS:
        rate = max(rate, _best_rate(large, dtype, device, _MEASURE_SECONDS * 3 / 4))
    return rate


def _best_rate(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Times [size, size] matrix products for `seconds`, at least one; returns the FLOP/s of the fastest."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    result = left @ right  # warm-up: the first call also creates threads, buffers and kernels
    _synchronize(device)
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        _synchronize(device)
        end = time.perf_counter()
        fastest = min(fastest, end - start)
        if end > deadline:
            return 2.0 * size**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
