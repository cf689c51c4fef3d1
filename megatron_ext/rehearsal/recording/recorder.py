"""Observes every operation of a rehearsed rank: memory, FLOPs, traffic, and waits of the host.

Fake tensors have no values. An operation that returns a value to the host therefore returns 1 (0 for integers, True
for booleans), so that a loss is finite and no step is skipped. Each such operation counts as a wait.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_ext.platform.run_phases import FORWARD_BACKWARD, GRADIENTS, MODEL, OPTIMIZER, UPDATE
from megatron_ext.rehearsal.recording import memory_log
from megatron_ext.rehearsal.recording.activity import START, Activity, place
from megatron_ext.rehearsal.recording.memory_log import MemoryLog

aten = torch.ops.aten

_DYNAMIC = (aten.nonzero.default, aten.masked_select.default)
_KIND_OF_PHASE = {
    MODEL: (memory_log.WEIGHTS, "as the model was built"),
    GRADIENTS: (memory_log.GRADIENTS, "gradient buffers"),
    OPTIMIZER: (memory_log.OPTIMIZER, "main weights"),
}


class Recorder(TorchDispatchMode):
    """Records the operations inside `with recorder:`; also observes the run's phases."""

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity
        self.memory = MemoryLog()
        self.flops: Counter[tuple[str, str, torch.dtype]] = Counter()
        """FLOPs of matrix products by scope, phase and precision."""

        self.traffic: Counter[tuple[str, str, str]] = Counter()
        """Bytes that other operations read and write, by scope, phase and place."""

        self.modules: list[str] = []
        """Names of the modules whose forward pass is running, from the outermost."""

        self.chunks = self.parameters = 0
        self._names: dict[int, str] = {}
        self._hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter),
            torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        """Removes the hooks that follow the modules."""
        for hook in self._hooks:
            hook.remove()

    # Phases

    def begin(self, phase: str) -> None:
        """Records that a phase of the run begins."""
        self.activity.begin(phase)

    def end(self, phase: str, result: Any) -> None:
        """Records that a phase has ended; marks the memory that it made as weights, gradients or optimizer state."""
        self.activity.end()
        if phase == MODEL and result is not None:
            self.chunks = len(result)
            for chunk in result:
                self._names |= {id(module): name for name, module in chunk.named_modules()}
                self.parameters += sum(parameter.numel() for parameter in chunk.parameters())
        elif phase == GRADIENTS and result is not None:
            for chunk in result:
                # The distributed optimizer has moved the weights into one buffer.
                self.memory.mark(chunk.parameters(), memory_log.WEIGHTS, "in the parameter buffer")
        elif phase == UPDATE and self.activity.step == 1:
            self.memory.keep(UPDATE, memory_log.OPTIMIZER)

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        self.modules.append(self._names.get(id(module)) or type(module).__name__)

    def _leave(self, *_: Any) -> None:
        if self.modules:
            self.modules.pop()

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.activity.operations += 1
        if func is aten._local_scalar_dense.default:
            return self._to_host(func, args[0])
        if func is aten.equal.default and args[0].is_cuda:
            self.activity.waits_for_device("equal")
            return True
        if func in _DYNAMIC and args[0].is_cuda:
            return self._dynamic(func, args[0])
        _check_generator(func, args, kwargs)
        out = func(*args, **kwargs)
        values = tree_leaves(out)
        for value in values:
            if isinstance(value, torch.Tensor) and _is_on_device(value):
                self._allocate(value.untyped_storage())
        self._count_work(func, args, kwargs, out, values)
        return out

    def _to_host(self, func: Any, value: torch.Tensor) -> Any:
        if not isinstance(value, FakeTensor):
            return func(value)
        if value.is_cuda:
            self.activity.waits_for_device("value read by the host")
        constant = getattr(value, "constant", None)
        return constant.item() if constant is not None else value_on_host(value.dtype)

    def _dynamic(self, func: Any, value: torch.Tensor) -> torch.Tensor:
        """Replaces an operation whose result has a size that depends on values; returns a result of the largest
        possible size.
        """
        self.activity.waits_for_device(f"size of the result of {func}")
        if func is aten.nonzero.default:
            return value.new_zeros((value.numel(), value.dim()), dtype=torch.int64)
        return value.new_zeros(value.numel())

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        if self.memory.knows(storage):
            return
        kind, where = self._describe()
        activity = self.activity
        self.memory.add(storage, kind, activity.scope, activity.phase, where)

    def _describe(self) -> tuple[str, str]:
        """Returns the kind and the place of a tensor that is being allocated."""
        phase = self.activity.phase
        known = _KIND_OF_PHASE.get(phase)
        if known is not None:
            return known
        module = self._module()
        backward = torch._C._current_graph_task_id() != -1
        if phase == FORWARD_BACKWARD and not backward:
            return memory_log.ACTIVATIONS, module or place()
        if backward:
            return memory_log.TEMPORARY, f"backward: {module or 'gradients of activations'}"
        return memory_log.TEMPORARY, place()

    def _module(self) -> str:
        """Returns the innermost module whose forward pass is running, with * for layer numbers; "" outside modules."""
        return re.sub(r"\b\d+\b", "*", self.modules[-1]) if self.modules else ""

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any, values: list[Any]) -> None:
        scope, phase = self.activity.scope, self.activity.phase
        if scope == START or func.is_view or func.namespace == "prim":
            return
        if func is aten.bmm.default and args[0].size(1) == 1 and args[1].stride(0) == 0:
            self.activity.is_odd("a matrix product is computed row by row; see models/ops/plain_strides.py")
        first = next((v for v in values if isinstance(v, torch.Tensor)), None)
        count = flop_registry.get(func._overloadpacket)
        if count is not None and first is not None:
            self.flops[scope, phase, first.dtype] += count(*args, **kwargs, out_val=out)
            return
        if func in (aten.empty.memory_format, aten.empty_like.default, aten.detach.default):
            return
        moved = {id(v): v for v in _tensors((args, kwargs.values(), values))}
        size = sum(v.numel() * v.element_size() for v in moved.values() if _is_on_device(v))
        self.traffic[scope, phase, self._module() or _backward() or phase] += size


def _is_on_device(value: torch.Tensor) -> bool:
    # To ask a fake tensor for `is_cuda` is an operation of its own: 5 microseconds, several times per operation.
    return value.fake_device.type == "cuda" if isinstance(value, FakeTensor) else value.is_cuda


def _backward() -> str:
    """Returns the operation whose gradient is being computed; "" outside the backward pass."""
    node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
    return "" if node is None else f"backward: {node.name().rsplit('::')[-1]}"


def _tensors(parts: Iterable[Iterable[Any]]) -> Iterator[torch.Tensor]:
    """Yields the tensors among an operation's arguments and results, including tensors in lists."""
    for part in parts:
        for value in part:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (each for each in value if isinstance(each, torch.Tensor))


def value_on_host(dtype: torch.dtype) -> Any:
    """Returns the value that the host gets when it reads a fake tensor of this type."""
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0


def _check_generator(func: Any, args: Any, kwargs: Any) -> None:
    generator = kwargs.get("generator")
    if generator is None:
        return
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
    if device.type != generator.device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found '{generator.device.type}' ({func})"
        )
