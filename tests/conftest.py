"""Imports the engine once, quietly: the warnings of its imports are not ours and would fail the tests as errors."""

import gc
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_ext.platform.process_groups  # noqa: F401


def pytest_collection_finish() -> None:
    """Exempts the million objects that are imported by now from the garbage collector, which finds no garbage there."""
    gc.freeze()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 KB, or of the size that is given as indirect parameter."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = getattr(request, "param", "900k")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
