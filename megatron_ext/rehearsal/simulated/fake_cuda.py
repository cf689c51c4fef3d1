"""Makes `torch.cuda` and copies between host and device work with fake CUDA tensors; counts the copies and the waits.

No values are computed. Errors that a GPU would raise are raised here too, for example for `numpy()` of a CUDA tensor,
or for a random state on the wrong device.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_ext.platform import host_copy
from megatron_ext.rehearsal.recording.activity import Activity
from megatron_ext.rehearsal.recording.memory_log import MemoryLog
from megatron_ext.rehearsal.recording.recorder import value_on_host
from megatron_ext.rehearsal.simulated.devices import GPUS_PER_HOST, Device

_DEVICE = torch.device("cuda", 0)
_RANDOM_STATE_BYTES = 16
_ARRAY = "array_in_rehearsal"  # attribute of a tensor: the array from which `from_numpy` made it
_PINNED = "is_pinned_in_rehearsal"  # attribute of a tensor that `pin_memory` was called for


def install(device: Device, activity: Activity, memory: MemoryLog) -> None:
    """Replaces functions of torch, for the rest of this process."""
    mode: Any = FakeTensorMode
    type.__setattr__(mode, "avoid_device_init", True)
    _patch_device_calls(device, activity, memory)
    _patch_random_state()
    _patch_transfers(activity)
    _patch_modules()


class _Stream:
    """Replaces `torch.cuda.Stream`."""

    activity: Activity

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _DEVICE
        self.cuda_stream = self.stream_id = 0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def synchronize(self) -> None:
        self.activity.waits_for_device("Stream.synchronize")

    def wait_stream(self, _: Any) -> None:
        return None

    wait_event = wait_stream

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """Replaces `torch.cuda.Event`."""

    activity: Activity

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _DEVICE

    def record(self, *_: Any) -> None:
        return None

    wait = record

    def synchronize(self) -> None:
        self.activity.waits_for_device("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 1.0


class _Properties:
    def __init__(self, device: Device) -> None:
        self.name, self.total_memory = device.name, device.memory
        self.major, self.minor = device.capability
        self.multi_processor_count, self.warp_size, self.gcnArchName = 132, 32, ""


def _patch_device_calls(device: Device, activity: Activity, memory: MemoryLog) -> None:
    cuda: Any = torch.cuda
    _Stream.activity = _Event.activity = activity
    cuda.Stream, cuda.Event = _Stream, _Event
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    for name in ("set_device", "_lazy_init", "init", "set_stream", "empty_cache", "ipc_collect"):
        setattr(cuda, name, nothing)
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, nothing)
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *_: _Stream())
    for name in ("is_available", "is_initialized", "is_bf16_supported"):
        setattr(cuda, name, lambda *_, **__: True)
    cuda.device_count, cuda.current_device = lambda: GPUS_PER_HOST, lambda: 0
    cuda.is_current_stream_capturing = lambda: False
    inner: Any = torch._C
    inner._cuda_getCurrentRawStream = lambda index: 0  # bitsandbytes reads this function when it is imported
    cuda.synchronize = lambda *_: activity.waits_for_device("torch.cuda.synchronize")
    cuda.get_device_name = lambda *_: device.name
    cuda.get_device_capability = lambda *_: device.capability
    cuda.get_device_properties = lambda *_: _Properties(device)
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: memory.live
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: memory.peak
    cuda.reset_peak_memory_stats = lambda *_: memory.reset_peak()
    cuda.memory_stats = lambda *_: defaultdict(int)
    cuda.mem_get_info = lambda *_: (device.memory - memory.live, device.memory)


def _patch_random_state() -> None:
    state = torch.zeros(_RANDOM_STATE_BYTES, dtype=torch.uint8)
    cuda: Any = torch.cuda

    def set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        if new_state.device.type != "cpu":
            raise TypeError(f"RNG state must be a torch.ByteTensor on the CPU (got {new_state.device})")

    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = lambda *_, **__: state, set_state
        module.manual_seed = lambda seed: None
    cuda.default_generators = tuple(torch.Generator("cuda:0") for _ in range(GPUS_PER_HOST))


def _patch_transfers(activity: Activity) -> None:
    tensor_class: Any = torch.Tensor
    move, to_list, to_numpy = tensor_class.to, tensor_class.tolist, tensor_class.numpy

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved: torch.Tensor = move(self, *args, **kwargs)
        if moved.device.type != self.device.type:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            to_device = self.device.type == "cpu"
            waits = waits or (to_device and not getattr(self, _PINNED, False))
            size = moved.numel() * moved.element_size()
            activity.copies_between("to device" if to_device else "to host", size)
            if waits:
                activity.waits_for_device(f"copy {'to the device' if to_device else 'to the host'}")
        return moved

    def tolist(self: torch.Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return to_list(self)
        if self.is_cuda:
            activity.waits_for_device("tolist")
        if hasattr(self, _ARRAY):
            return getattr(self, _ARRAY).tolist()
        return _nested(self.shape, value_on_host(self.dtype))

    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return to_numpy(self, *args, **kwargs)
        if self.is_cuda:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                "host memory first."
            )
        return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))

    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        setattr(self, _PINNED, True)
        return self

    tensor_class.to, tensor_class.tolist, tensor_class.numpy = to, tolist, numpy
    fake_class: Any = FakeTensor
    fake_class.tolist = (
        tolist  # FakeTensor's own method reads the values one by one, but a GPU's reads them all at once
    )
    tensor_class.pin_memory = pin_memory
    tensor_class.cpu = lambda self, *_, **__: self.to("cpu")
    tensor_class.cuda = lambda self, device=None, non_blocking=False, **_: self.to(
        _DEVICE, non_blocking=non_blocking
    )
    _patch_tensor(activity)
    _patch_from_numpy()
    _patch_sizes()


def _patch_from_numpy() -> None:
    """Lets `tolist` return the true values of a tensor that was made from an array, because they may decide which
    kernels run.
    """
    make: Any = torch.from_numpy

    def from_numpy(ndarray: Any) -> torch.Tensor:
        made: torch.Tensor = make(ndarray)
        setattr(made, _ARRAY, ndarray)
        return made

    torch.from_numpy = from_numpy


def _patch_sizes() -> None:
    """Makes `read_sizes` return the expected sizes, because the true ones depend on values."""

    def read_sizes(sizes: torch.Tensor, expected: list[int]) -> list[int]:
        sizes.tolist()  # the host waits
        return expected

    host_copy.read_sizes = read_sizes


def _patch_tensor(activity: Activity) -> None:
    make: Any = torch.tensor

    def values(data: Any) -> Any:
        if isinstance(data, FakeTensor):
            if data.is_cuda:
                activity.waits_for_device("torch.tensor of values on the device")
            return _nested(data.shape, value_on_host(data.dtype))
        return [values(each) for each in data] if isinstance(data, (list, tuple)) else data

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = make(values(data), *args, **kwargs)
        if made.is_cuda:
            activity.waits_for_device("copy to the device by torch.tensor")
        return made

    torch.tensor = tensor


def _patch_modules() -> None:
    """Replaces the method of `Module` that converts parameters; torch's own swaps storages, which fake tensors do not
    support.
    """
    module_class: Any = torch.nn.Module

    def apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if recurse:
            for module in self.children():
                module._apply(fn, recurse)
        for parameter in self._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    changed = fn(parameter)
                if changed is not parameter:
                    parameter.data = changed
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    module_class._apply = apply
    module_class.cuda = lambda self, *_: self.to(_DEVICE)


def _nested(shape: torch.Size, value: Any) -> Any:
    return value if not shape else [_nested(shape[1:], value) for _ in range(shape[0])]
