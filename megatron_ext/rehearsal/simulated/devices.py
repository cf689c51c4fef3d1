"""The GPUs that a rehearsal can simulate, with their memory and rates from the vendor's data sheets.

The FLOP rates are those of `platform.peak_rate`. A real run rarely reaches any of these rates.
"""

from dataclasses import dataclass, replace

GIB = 1 << 30
GPUS_PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU and the links of its host."""

    name: str
    """Result of `torch.cuda.get_device_name`; the table of FLOP rates uses this name."""

    memory: int
    """Bytes that torch can allocate."""

    bandwidth: float
    """Bytes per second between the GPU and its memory."""

    link: float
    """Bytes per second that a GPU can send to the other GPUs of its host."""

    network: float
    """Bytes per second that a GPU can send to other hosts; assumed, because it depends on the cluster."""

    capability: tuple[int, int]


def _device(
    name: str, gib: float, bandwidth: float, link: float, network: float, capability: tuple[int, int]
) -> Device:
    giga = 1e9
    return Device(
        name=name,
        memory=int(gib * GIB),
        bandwidth=bandwidth * giga,
        link=link * giga,
        network=network * giga,
        capability=capability,
    )


_DEVICES = {
    # GiB that torch reports, GB/s of memory, GB/s of NVLink or PCIe in one direction, GB/s of network per GPU
    "H100": _device("NVIDIA H100 80GB HBM3", 79.1, 3350, 450, 50, (9, 0)),
    "H200": _device("NVIDIA H200", 139.8, 4800, 450, 50, (9, 0)),
    "B200": _device("NVIDIA B200", 178.3, 8000, 900, 50, (10, 0)),
    "A100": _device("NVIDIA A100-SXM4-80GB", 79.2, 2039, 300, 25, (8, 0)),
    "A100-40GB": _device("NVIDIA A100-SXM4-40GB", 39.4, 1555, 300, 25, (8, 0)),
    "L40S": _device("NVIDIA L40S", 44.4, 864, 32, 12.5, (8, 9)),
    "A10": _device("NVIDIA A10", 22.0, 600, 32, 12.5, (8, 6)),
    "L4": _device("NVIDIA L4", 22.0, 300, 32, 12.5, (8, 9)),
}


def device_named(name: str, memory_gib: float | None) -> Device:
    """Returns the GPU of a short name such as `H100`; `memory_gib`, if given, overrides its memory size.

    Raises:
        ValueError: the name is unknown.
    """
    found = _DEVICES.get(name.upper())
    if found is None:
        raise ValueError(f"--rehearsal-device {name}: must be one of {', '.join(_DEVICES)}")
    return found if memory_gib is None else replace(found, memory=int(memory_gib * GIB))
