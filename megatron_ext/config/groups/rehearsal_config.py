"""`--rehearse`: runs one rank of a cluster run on a simulated GPU; see docs/rehearsal.md."""

from dataclasses import dataclass
from typing import Annotated

from megatron_ext.config.command_line.field_checks import Spelling, check_at_least, check_positive

ALL_KINDS = "all-kinds"


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """Flags for a rehearsal, which needs no GPU, no data and no checkpoint."""

    rehearse: Annotated[str | None, Spelling(metavar="[RANK|all-kinds]", without_value="0")] = None
    """Run two steps and an evaluation of one rank on a simulated GPU, print its memory, communication and waits, and
    exit. Default rank: 0. With all-kinds, one rank each of the first, the second and the last pipeline stage is
    rehearsed.
    """

    world_size: int | None = None
    """With --rehearse or --dry-run: number of processes of the run. Default: WORLD_SIZE if it is set, otherwise the
    number that one model copy needs.
    """

    rehearsal_device: str = "H100"
    """With --rehearse: name of the simulated GPU, which determines its memory, compute rate and bandwidth."""

    device_memory_gb: float | None = None
    """With --rehearse: memory of the simulated GPU in GiB. Default: the memory of the GPU named by
    --rehearsal-device.
    """

    def __post_init__(self) -> None:
        check_at_least(self, 1, "world_size")
        check_positive(self, "device_memory_gb")
        if self.rehearse is not None and self.rehearse != ALL_KINDS and not self.rehearse.isdigit():
            raise ValueError(f"--rehearse {self.rehearse}: must be a rank or {ALL_KINDS}")
        if self.device_memory_gb is not None and self.rehearse is None:
            raise ValueError(f"--device-memory-gb {self.device_memory_gb}: requires --rehearse")

    @property
    def is_on(self) -> bool:
        """True if the run is rehearsed."""
        return self.rehearse is not None
