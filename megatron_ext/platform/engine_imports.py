"""Halves the time that a process needs to import torch and megatron-core, and to end; guards Transformer Engine.

- Both create half a million objects that live as long as the process. The garbage collector would scan them again and
  again while they are created, and once more when the process ends.
- megatron-core hands some sixty functions to `torch.compile` while it is imported, which imports torch's compiler. Here
  each function is compiled when it is first called; with the layers of this package on a CPU, that is never.
- torch's optimizers import the compiler to exclude their methods from being compiled. Here they do so only in a process
  that has the compiler.
- megatron-core uses Transformer Engine wherever it can be imported, and ends with any error of that import that is not
  a ModuleNotFoundError. Here it can be imported only where it can be used; elsewhere the engine finds it absent.
"""

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

TE_VERSIONS = ">=2.9.0a0,<2.12.0"
"""Versions of Transformer Engine that megatron-core 0.16.1 names in its metadata."""

_JIT = "megatron.core.jit"
_COMPILER = "torch._dynamo"
_TE = "transformer_engine"
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
        if name not in (_JIT, _TE, *_LARGE, *_REPLACED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            loader = _GuardedLoader if name == _TE else _Loader
            spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _JIT:
            super().exec_module(module)
            # The other modules of megatron-core take the decorator from here.
            vars(module)["jit_fuser"] = compile_when_called
            return
        if module.__name__ in _REPLACED:
            super().exec_module(module)
            name, replace = _REPLACED[module.__name__]
            if name in vars(module):
                vars(module)[name] = replace(vars(module)[name])
            return
        enabled = gc.isenabled()
        gc.disable()
        try:
            super().exec_module(module)
        finally:
            if enabled:
                gc.enable()
        gc.freeze()  # what exists now is looked through no more


class _GuardedLoader(SourceFileLoader):
    """Turns every reason why Transformer Engine cannot be used into a ModuleNotFoundError."""

    problem: str | None = None

    def exec_module(self, module: ModuleType) -> None:
        cls = type(self)
        cls.problem = cls.problem or _unsupported_version() or _missing_device()
        if cls.problem is None:
            try:
                super().exec_module(module)
                importlib.import_module(f"{_TE}.pytorch")
            except (
                Exception
            ) as error:  # shared libraries that are missing or do not fit raise whatever they like
                first_line = str(error).strip().split("\n")[0]
                cls.problem = f"{_named(_TE)} cannot be imported ({type(error).__name__}: {first_line})"
        if cls.problem is not None:
            raise ModuleNotFoundError(cls.problem)  # the only error that all of the engine's imports expect


def hide_transformer_engine(reason: str) -> None:
    """Makes Transformer Engine count as absent in this process; call it before megatron-core is imported."""
    _GuardedLoader.problem = reason


@functools.cache
def transformer_engine_problem() -> str | None:
    """Returns why Transformer Engine cannot be used in this process, as a clause; None if it can be used."""
    if importlib.util.find_spec(_TE) is None:
        # Where there is no device, installing it would not help.
        return _missing_device() or "Transformer Engine is not installed (pip install 'megatron-ext[te]')"
    try:
        importlib.import_module(_TE)
    except ImportError as error:
        return str(error)
    return None


def _unsupported_version() -> str | None:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(TE_VERSIONS).contains(importlib.metadata.version(_TE), prereleases=True):
        return None
    return f"{_named(_TE)} is installed, but {_named('megatron-core')} supports {TE_VERSIONS}"


def _missing_device() -> str | None:
    import torch

    return (
        None if torch.cuda.is_available() else "Transformer Engine requires a CUDA device, and none was found"
    )


def _named(package: str) -> str:
    name = "Transformer Engine" if package == _TE else package
    return f"{name} {importlib.metadata.version(package)}"


def compile_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a wrapper of `function` that compiles it with `torch.compile` on the first call."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call


def _disable_compiler(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `torch._disable_dynamo`, whose functions import the compiler when they are first called."""

    def decorator(function: Callable[..., Any] | None = None, recursive: bool = True) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorator, recursive=recursive)
        excluded = disable(function, recursive)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (excluded if _COMPILER in sys.modules else function)(*args, **kwargs)

        return call

    return decorator


def _step_without_compiler(with_compiler: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the decorator of `torch.optim.Optimizer.step`, which imports the compiler to break its graphs."""

    def decorator(step: Callable[..., Any]) -> Callable[..., Any]:
        broken = with_compiler(step)

        @functools.wraps(step)
        def call(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if _COMPILER in sys.modules:
                return broken(optimizer, *args, **kwargs)
            import torch

            with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
                return step(optimizer, *args, **kwargs)

        return call

    return decorator


_REPLACED = {
    "torch._compile": ("_disable_dynamo", _disable_compiler),
    "torch.optim.optimizer": ("_use_grad_for_differentiable", _step_without_compiler),
}
"""For each module of torch, the name of the function that is replaced when the module is imported, and by what."""
