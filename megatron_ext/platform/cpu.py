"""Runs megatron-core on a machine without a GPU by redirecting `torch.cuda` to the CPU.

megatron-core calls functions of CUDA unconditionally in about a hundred places. `install` replaces them with CPU
counterparts: the current device is `cpu`, a stream does nothing, the random state is the CPU's, and `device="cuda"`
in a factory call means `device="cpu"`. `torch.cuda.is_available()` still returns False, so that other libraries do not
expect a GPU.

This does not emulate a GPU: nothing runs asynchronously, and CUDA-only kernels stay unavailable.
"""

import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_ext.platform.process.allocator import keep_freed_memory

_CPU = torch.device("cpu")
_FACTORIES = (
    *(
        "arange",
        "as_tensor",
        "empty",
        "empty_like",
        "eye",
        "full",
        "full_like",
        "ones",
        "ones_like",
        "rand",
        "randint",
    ),
    *("randn", "randperm", "tensor", "triu_indices", "zeros", "zeros_like"),
)
_installed = False


class CpuStream:
    """Replaces `torch.cuda.Stream`. Work on a CPU is finished when a call returns, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU

    def __enter__(self) -> "CpuStream":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def wait_stream(self, _: Any) -> None:
        return None

    wait_event = wait_stream

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        return event or CpuEvent()


class CpuEvent:
    """Replaces `torch.cuda.Event`. Every event counts as completed, because work on a CPU is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU

    def record(self, *_: Any) -> None:
        return None

    wait = synchronize = record

    def query(self) -> bool:
        return True


def install() -> None:
    """Redirects `torch.cuda` to the CPU; further calls do nothing. Call before a model is built.

    Raises:
        RuntimeError: a CUDA device is present.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed: this machine has a CUDA device")
    if _installed:
        return
    _installed = True
    _patch_device_calls()
    _patch_random_state()
    _patch_factories()
    _patch_type_names()
    keep_freed_memory()
    # mcore warns if the CPU's random state changes inside a GPU stream; here, both are the same state.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _patch_device_calls() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = CpuStream, CpuEvent
    cuda.current_device = lambda: _CPU
    cuda.current_stream = cuda.default_stream = lambda *_: CpuStream()
    cuda.stream = lambda stream: CpuStream()
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    tensor_class.cuda = lambda self, *_, **__: self
    module_class.cuda = lambda self, *_, **__: self


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random as engine_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    engine: Any = engine_random
    cuda: Any = torch.cuda
    engine._get_cuda_rng_state, engine._set_cuda_rng_state = get_state, set_state
    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
        # Not `torch.manual_seed`: it calls `torch.cuda.manual_seed_all` and would recurse.
        module.manual_seed = torch.default_generator.manual_seed


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        # Memory is pinned for copies to a GPU; without a GPU, torch refuses to pin memory.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _patch_factories() -> None:
    # transformers builds models inside `with torch.device("meta")`. This context recognizes factories by identity, and
    # caches them at its first use. Fill the cache before the factories are replaced; otherwise it would recognize
    # none of them.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_class: Any = torch.Tensor
    move = tensor_class.to

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | torch.device) and str(args[0]).startswith("cuda"):
            args = (_CPU, *args[1:])
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return move(self, *args, **kwargs)

    tensor_class.to = to


def _patch_type_names() -> None:
    """Makes CPU tensors report the type name `torch.cuda.*Tensor`, by which mcore's optimizers recognize precisions."""
    tensor_class: Any = torch.Tensor
    type_of = tensor_class.type

    @functools.wraps(type_of)
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
        return type_of(self, dtype, *args, **kwargs)

    tensor_class.type = type_name
