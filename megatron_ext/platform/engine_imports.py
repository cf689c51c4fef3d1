"""Halves the time that a process needs to import torch and megatron-core, and to end.

- Both create half a million objects that live as long as the process. The garbage collector would scan them again and
  again while they are created, and once more when the process ends.
- megatron-core hands some sixty functions to `torch.compile` while it is imported, which imports torch's compiler. Here
  each function is compiled when it is first called; with the layers of this package on a CPU, that is never.
"""

import functools
import gc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_JIT = "megatron.core.jit"
_LARGE = ("torch", "megatron.core")


def install() -> None:
    """Makes every later import of torch and megatron-core, from any file, go through this module."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torch and megatron-core modules as Python does, and gives them another loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _JIT and name not in _LARGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _JIT:
            super().exec_module(module)
            # The other modules of megatron-core take the decorator from here.
            vars(module)["jit_fuser"] = compile_when_called
            return
        enabled = gc.isenabled()
        gc.disable()
        try:
            super().exec_module(module)
        finally:
            if enabled:
                gc.enable()
        gc.freeze()  # what exists now is looked through no more


def compile_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `torch.compile(function)`, and compiles it when it is first called."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call
