"""Lets this process import Transformer Engine without CUDA: its own Python code, with our reference in place of its
compiled extension.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron_ext.platform import engine_imports

FOLDER = Path(sys.prefix, "transformer_engine_python")
"""Folder into which `make install` puts the package. It is not on Python's path, because the package's import fails
without CUDA.
"""

_EXTENSION = "transformer_engine_torch"
_OPTIONAL = (
    "onnxscript",
    "onnx",
    "triton",
    "einops",
)  # imported by parts of the package that are not used here


def install() -> None:
    """Makes Transformer Engine importable in this process, on a CPU; call it before megatron-core is imported."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then loads no CUDA libraries
    sys.path.append(str(FOLDER))
    absent = {name for name in _OPTIONAL if importlib.util.find_spec(name) is None}
    finder = _Finder({_EXTENSION} | absent)
    sys.meta_path.insert(0, finder)
    engine: Any = engine_imports
    engine._missing_device = lambda: None
    _pretend_device()
    common = _import_common()
    import transformer_engine

    transformer_engine.common = common
    if "triton" in absent:
        # torch would compile with triton, if it were there.
        finder.names.discard("triton")
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            del sys.modules[name]


class _Finder:
    """Imports an `Extension` under each of the given names: the compiled extension's, and those of absent packages."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from megatron_ext.testing.transformer_engine.extension import Extension

        return Extension(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing, because the module's class already defines its content."""


def _pretend_device() -> None:
    """Makes Transformer Engine, but no other code, find a GPU of compute capability 8.0, which has no FP8."""
    import torch

    cuda: Any = torch.cuda
    device = SimpleNamespace(major=8, minor=0, multi_processor_count=1)
    cuda.get_device_properties = lambda *_: device
    cuda.get_device_capability = lambda *_: (device.major, device.minor)
    cuda.is_current_stream_capturing = lambda: False
    cuda.is_available = lambda: sys._getframe(1).f_globals["__name__"].startswith("transformer_engine.")
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)


def _import_common() -> ModuleType:
    """Imports `transformer_engine.common`, and replaces its function that loads the extension's shared library."""
    name = "transformer_engine.common"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "transformer_engine" / "common" / "__init__.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    vars(module)["load_framework_extension"] = lambda framework: None
    return module
