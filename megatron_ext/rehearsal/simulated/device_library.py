"""Compiles `fake_device.cpp` once for each version of torch, keeps the library in the user's cache, and loads it.

The library must be loaded before torch is imported, so this module does not import torch.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTED = ("2.13",)
"""Versions of torch with which the rehearsal has been tested."""

_SOURCE = Path(__file__).with_name("fake_device.cpp")
_NEEDED = ("libgomp", "libc10.so", "libtorch_cpu.so")
_loaded = False


def is_loaded() -> bool:
    """Returns whether this process has loaded the simulated device."""
    return _loaded


def load() -> None:
    """Loads the simulated device into this process; call this before torch is imported.

    Raises:
        ValueError: this machine, its compiler or its torch is not supported; the message is one line.
        OSError: the library cannot be written or loaded.
    """
    global _loaded
    path = library()
    # Load torch's own libraries first, because the library uses their symbols.
    folder = _torch() / "lib"
    for name in _NEEDED:
        for needed in sorted(folder.glob(f"{name}*")):
            ctypes.CDLL(str(needed), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _loaded = True


def library() -> Path:
    """Returns the path of the compiled library, and compiles it if necessary; raises the errors of `load`."""
    path = _path()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path)
    return path


def why_not() -> str | None:
    """Returns the reason why a rehearsal cannot run on this machine, as one line; None if it can."""
    try:
        path = _path()
        if not path.is_file():
            _check_compiler()
    except ValueError as error:
        return str(error)
    return None


def _path() -> Path:
    version = importlib.metadata.version("torch")
    _check(version)
    digest = hashlib.sha256(_SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ext"
    return cache / f"fake_device-{digest}.so"


def _check(version: str) -> None:
    if not sys.platform.startswith("linux"):
        raise ValueError(f"--rehearse: requires Linux (this is {sys.platform})")
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise ValueError(f"--rehearse: requires torch {' or '.join(TESTED)} (got {version})")
    if (_torch() / "lib" / "libtorch_cuda.so").is_file():
        raise ValueError(
            f"--rehearse: requires the CPU build of torch (got {version}, a CUDA build); install the CPU build"
        )


def _check_compiler() -> None:
    if shutil.which(_compiler()) is None:
        raise ValueError(
            f"--rehearse: requires a C++ compiler at its first use ({_compiler()} was not found); "
            "install g++, or set "
            "CXX"
        )


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compile(path: Path) -> None:
    _check_compiler()
    root = _torch()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [_compiler(), "-shared", "-fPIC", "-std=c++20", "-O1", str(_SOURCE), "-o", str(made)]
        command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        command += [f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.split("\n") if "error" in line), "it printed nothing")
            raise ValueError(f"--rehearse: {_compiler()} could not compile {_SOURCE}: {reason}")
        made.replace(path)
