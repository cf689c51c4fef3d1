#!/usr/bin/env python3
"""Fills a folder with what `make gpu` needs beside Python and torch: wheels, and the rehearsals' figures.

    make gpu-wheels GPU_PYTHON_VERSION=3.12

The wheels are of the versions that are installed here, for the other machine's Python on Linux, x86-64. torch and what
only torch requires are left out.
"""

import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_ext.config.command_line.parse import parse, run_main

ROOT = Path(__file__).parents[2]
_GLIBC = (17, 24, 27, 28, 31, 34, 35)
_PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in _GLIBC),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Flags for the folder to fill."""

    output: str
    """Folder to write; an existing one is emptied first."""

    python_version: str
    """Version of the other machine's Python, for example 3.12."""

    skip: tuple[str, ...] = ()
    """Packages to leave out, because the other machine has them."""


def main() -> None:
    """Builds our wheel, downloads the others, and rehearses."""
    config: CollectConfig = parse(
        CollectConfig, prog="benchmarks/gpu/collect.py", description="Collect what `make gpu` needs."
    )
    folder = Path(config.output)
    shutil.rmtree(folder, ignore_errors=True)
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={config.python_version}"]
    needed = requirements(next(folder.glob("*.whl")), config.python_version)
    wanted = [each for each in needed if each.split("==")[0] not in config.skip]
    _pip("download", "--no-deps", "--dest", str(folder), *target, *platforms, *wanted)
    command = [sys.executable, "-m", "megatron_ext.rehearsal", "benchmarks/gpu/rehearsed.py"]
    subprocess.run([*command, "--output", str(folder / "rehearsed.json")], check=True, cwd=ROOT)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels and rehearsed.json, {size / 2**20:.0f} MiB")


def requirements(wheel: Path, python_version: str) -> list[str]:
    """Returns the packages, except torch, that our wheel and its extra `hf` require, as `name==version`.

    Args:
        wheel: path of our wheel.
        python_version: version of the Python for which the requirements are chosen.
    """
    environment = default_environment() | {
        "python_version": python_version,
        "python_full_version": python_version,
    }
    found: dict[str, str] = {}
    ours = next(iter(importlib.metadata.distributions(path=[str(wheel)])))
    open_ones = [(ours, {"hf"})]
    while open_ones:
        distribution, extras = open_ones.pop()
        for text in distribution.requires or []:
            needed = Requirement(text)
            places = [{**environment, "extra": extra} for extra in ("", *extras)]
            applies = needed.marker is None or any(needed.marker.evaluate(place) for place in places)
            name = canonicalize_name(needed.name)
            if applies and name != "torch" and name not in found:
                installed = importlib.metadata.distribution(name)
                found[name] = installed.version.split("+")[0]
                open_ones.append((installed, needed.extras))
    return sorted(f"{name}=={version}" for name, version in found.items())


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


if __name__ == "__main__":
    run_main(main)
