"""A finished sequential run that several files of tests look at."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.testing.run_single import run_single
from tests.integration.npt.kill_and_resume import flags_of
from tests.integration.npt.npt_run_helpers import make_base, train, write_data


@dataclass(frozen=True)
class SequentialRun:
    """Layers 0, 1 and 3 of a tiny model, trained one after the other."""

    root: Path
    base: str
    data: str
    output: str

    @property
    def folder(self) -> Path:
        """The run's directory; tests leave it as it is."""
        return self.root / "sequential"

    def flags(self, folder: Path) -> list[str]:
        """The same command for another directory."""
        return flags_of("sequential", str(folder), self.base, self.data)

    def layer(self, number: int) -> Path:
        """Checkpoints of a layer."""
        return next(self.folder.glob(f"layer_{number}_*")) / "checkpoints"


@pytest.fixture(scope="session")
def sequential_run(tmp_path_factory: pytest.TempPathFactory) -> SequentialRun:
    """The run with its base model and data."""
    root = tmp_path_factory.mktemp("sequential")
    data = write_data(root)
    base = run_single(make_base, str(root), data)
    flags = flags_of("sequential", str(root / "sequential"), base, data)
    code, output = run_single(train, *flags)
    assert code == 0
    return SequentialRun(root, base, data, output)
