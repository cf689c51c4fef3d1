"""Halves the time that a process needs for its imports and its exit, and hides a Transformer Engine that is not usable.

- torch and megatron-core create half a million objects that live as long as the process. The garbage collector would
  scan them again and again while they are created, and once more when the process ends. Here, it skips them.
- While it is imported, megatron-core passes some sixty functions to `torch.compile`, which imports torch's compiler.
  Here, each function is compiled when it is first called; the layers of this package call none of them on a CPU.
- bitsandbytes does the same with four functions, which the four-bit weights of this package do not call.
- torch's optimizers import the compiler to exclude their methods from compilation. Here, they do so only in a process
  that has already imported the compiler.
- megatron-core uses Transformer Engine if it can be imported, and runs without it after a ModuleNotFoundError, but any
  other error in this import ends the process. Here, Transformer Engine seems absent if it is not usable.
- From 0.18 on, megatron-core's schedules import a module that requires triton, which torch's builds for CPUs do not
  contain. Here, the module is imported without triton: its kernels are only for mixtures of experts on GPUs.
"""

import builtins
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

_JIT = "megatron.core.jit"
_COMPILER = "torch._dynamo"
_TE = "transformer_engine"
_KERNELS = ("megatron.core.transformer.moe.paged_stash", "megatron.core.transformer.moe.ops.paged_stash")
"""Modules that import triton unconditionally: the first in megatron-core 0.18, the second from 0.19 on."""
_COMPILED = ("megatron.core.transformer.moe.router", "bitsandbytes.backends.default.ops")
"""Modules that compile functions while they are imported; the first does so from megatron-core 0.19 on."""
_LARGE = ("torch", "megatron.core")


def install() -> None:
    """Makes all later imports of torch and megatron-core go through this module."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds modules of torch and megatron-core as Python does, but gives them another loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in (_JIT, _TE, *_COMPILED, *_KERNELS, *_LARGE, *_REPLACED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            loaders: dict[str, type[SourceFileLoader]] = dict.fromkeys(_KERNELS, _KernelLoader)
            loaders |= {_TE: _GuardedLoader, **dict.fromkeys(_COMPILED, _CompilingLoader)}
            spec.loader = loaders.get(name, _Loader)(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _JIT:
            super().exec_module(module)
            # The other modules of megatron-core import the decorator from this module.
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
        gc.freeze()  # the garbage collector no longer scans objects that exist now


class _CompilingLoader(SourceFileLoader):
    """Loads a module that calls `torch.compile` itself instead of the engine's decorator."""

    def exec_module(self, module: ModuleType) -> None:
        import torch

        at_once = torch.compile
        vars(torch)["compile"] = compile_when_called
        try:
            super().exec_module(module)
        finally:
            vars(torch)["compile"] = at_once


class _KernelLoader(SourceFileLoader):
    """Loads a module of triton kernels; without triton, the kernels are plain functions that are never called."""

    def exec_module(self, module: ModuleType) -> None:
        if importlib.util.find_spec("triton") is None:
            # An `import` statement uses the builtins of its own module, so this affects no other module.
            vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import}
        super().exec_module(module)

    @staticmethod
    def _import(name: str, *args: Any) -> Any:
        if name not in ("triton", "triton.language"):
            return __import__(name, *args)
        return SimpleNamespace(jit=lambda kernel: kernel, language=SimpleNamespace(constexpr=object))


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
            except Exception as error:  # missing or incompatible shared libraries may raise any of these
                first_line = str(error).strip().split("\n")[0]
                cls.problem = f"{_named(_TE)} cannot be imported ({type(error).__name__}: {first_line})"
        if cls.problem is not None:
            raise ModuleNotFoundError(cls.problem)  # the only error that all of the engine's imports expect


def hide_transformer_engine(reason: str) -> None:
    """Makes Transformer Engine count as absent in this process; call it before megatron-core is imported."""
    _GuardedLoader.problem = reason


@functools.cache
def transformer_engine_problem() -> str | None:
    """Returns the reason why Transformer Engine cannot be used in this process; None if it can be used."""
    if importlib.util.find_spec(_TE) is None:
        # Check the device first: without one, installing Transformer Engine would not help.
        return _missing_device() or "Transformer Engine is not installed (pip install 'megatron-ext[te]')"
    try:
        importlib.import_module(_TE)
    except ImportError as error:
        return str(error)
    return None


def te_versions() -> str:
    """Returns the versions of Transformer Engine that megatron-core's metadata requires; "" from 0.17 on (any)."""
    from packaging.requirements import Requirement

    named = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or ()]
    specifiers = next((one.specifier for one in named if one.name == "transformer-engine"), ())
    return ",".join(sorted(map(str, specifiers), reverse=True))


def _unsupported_version() -> str | None:
    from packaging.specifiers import SpecifierSet

    supported = te_versions()
    if SpecifierSet(supported).contains(importlib.metadata.version(_TE), prereleases=True):
        return None
    return f"{_named(_TE)} is installed, but {_named('megatron-core')} supports {supported}"


def _missing_device() -> str | None:
    import torch

    return (
        None if torch.cuda.is_available() else "Transformer Engine requires a CUDA device, and none was found"
    )


def _named(package: str) -> str:
    name = "Transformer Engine" if package == _TE else package
    return f"{name} {importlib.metadata.version(package)}"


def compile_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns a wrapper of `function` that compiles it on the first call, with `torch.compile` and its `options`."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            compiled = torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


def _disable_compiler(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `torch._disable_dynamo` by a decorator that does not cause an import of the compiler.

    Functions decorated with the original import it when they are first called.
    """

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
    """Replaces the decorator of `torch.optim.Optimizer.step` by one that does not import the compiler.

    The original imports it in order to interrupt compiled graphs.
    """

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
"""For each module of torch, the name of the function that is replaced during import, and its replacement."""
