"""A device's peak: NVIDIA's figures by the name that torch gives, else a measurement."""

import pytest
import torch

from megatron_ext.platform.peak_rate import DevicePeak, device_peak, known_tflops, measured_flops


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA GH200 480GB", "fp32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L40S", "fp32", 91.6),
        ("NVIDIA L4", "fp32", 30.3),
    ],
)
def test_known_devices_are_told_apart(name: str, precision: str, tflops: float) -> None:
    assert known_tflops(name, precision) == tflops


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA A10G", "AMD Instinct MI300X"])
def test_a_device_that_is_not_in_the_table_is_unknown(name: str) -> None:
    assert known_tflops(name, "bf16") is None


def test_the_users_figure_is_taken_as_it_is() -> None:
    assert device_peak("bf16", tflops=1.5).flops_per_second == 1.5e12


def test_a_measured_peak_is_raised_to_what_a_run_reaches_and_a_known_one_is_not() -> None:
    measured = DevicePeak(1e3, "measured", torch.float32)
    raised = measured.raised(2e3)
    assert raised.flops_per_second > 1e8, "measured anew"
    assert raised.raised(1e30).flops_per_second == 1e30
    assert measured.raised(1e3) is measured
    given = device_peak("bf16", tflops=1.0)
    assert given.raised(1e30) is given


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_a_cpu_is_measured_once_a_process() -> None:
    first, second = device_peak("fp32"), device_peak("fp32")
    assert first == second
    assert first.source == "measured matrix product, fp32"
    assert 1e8 < first.flops_per_second < 1e15
    assert measured_flops.cache_info().misses == 1
