"""Replaces torch.distributed: the process group has one process, which acts as one rank of many.

Every collective is counted. It checks the sizes, types and devices of its tensors as NCCL does, and does not change
the tensors.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext.rehearsal.recording.activity import Activity, Call, place
from megatron_ext.rehearsal.simulated.devices import GPUS_PER_HOST

Tensors = torch.Tensor | Sequence[torch.Tensor]

# Short names of the engine's groups; if several names fit a group, the first one is used.
GROUPS = {
    "TP": "_TENSOR_MODEL_PARALLEL_GROUP",
    "PP": "_PIPELINE_MODEL_PARALLEL_GROUP",
    "CP": "_CONTEXT_PARALLEL_GROUP",
    "DP": "_DATA_PARALLEL_GROUP",
    "DP x CP": "_DATA_PARALLEL_GROUP_WITH_CP",
    "TP x PP": "_MODEL_PARALLEL_GROUP",
    "TP x CP": "_TENSOR_AND_CONTEXT_PARALLEL_GROUP",
    "first and last stage": "_EMBEDDING_GROUP",
    "TP x DP": "_TENSOR_AND_DATA_PARALLEL_GROUP",
    "TP x DP x CP": "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
    "DP (gloo)": "_DATA_PARALLEL_GROUP_GLOO",
    "DP x CP (gloo)": "_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
}


def group_name(group: Any) -> str:
    """Returns the short name of a process group."""
    if group is None:
        return "all"
    # Imported late, because the engine imports some functions of torch.distributed by name, which must be replaced
    # first.
    from megatron.core import parallel_state

    for name, attribute in GROUPS.items():
        held = getattr(parallel_state, attribute, None)
        if held is group or (isinstance(held, list) and any(each is group for each in held)):
            return name
    return "all" if group is dist.group.WORLD else f"{dist.get_world_size(group)} ranks"


class _Work:
    """Replaces the handle of asynchronous communication."""

    def __init__(self, awaited: Callable[[], None] | None = None) -> None:
        self._awaited = awaited

    def wait(self, *_: Any) -> bool:
        if self._awaited is not None:
            self._awaited()
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def append(self, _: Any) -> None:
        return None

    def get_future(self) -> "torch.futures.Future[Any]":
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(None)
        return future


class Collectives:
    """The collectives of a rehearsed rank, under the names that they have in torch.distributed."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def _sent(self, operation: str, tensors: Tensors, group: Any, asynchronous: bool = False) -> Any:
        sent = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        devices = {tensor.device.type for tensor in sent}
        if len(devices) > 1:
            raise RuntimeError(
                f"{operation}: tensors must be on one device (got {', '.join(sorted(devices))})"
            )
        for tensor in sent:
            if not tensor.is_contiguous():
                raise ValueError(f"{operation}: Tensors must be contiguous (got strides {tensor.stride()})")
        return self._record(operation, group, next(iter(devices), "cuda"), asynchronous, _bytes(sent))

    def _record(self, operation: str, group: Any, device: str, asynchronous: bool, size: int) -> _Work | None:
        activity, name, ranks = self._activity, group_name(group), dist.get_process_group_ranks(group)
        hosts = len({rank // GPUS_PER_HOST for rank in ranks})
        call = Call(operation, name, len(ranks), device, asynchronous, hosts, place())
        activity.communicates(call, size)
        if device == "cpu":
            activity.is_odd(f"{operation} of a CPU tensor over {name} (by gloo, not by NCCL)")
        return _Work(_at_wait(activity, call, size)) if asynchronous else None

    def _compare(self, operation: str, whole: Tensors, part: torch.Tensor, group: Any) -> None:
        """Checks the tensors of an all-gather or reduce-scatter: the whole tensor must hold one part for each rank."""
        ranks = dist.get_world_size(group)
        of_whole = whole.numel() if isinstance(whole, torch.Tensor) else sum(each.numel() for each in whole)
        first = whole if isinstance(whole, torch.Tensor) else whole[0]
        if of_whole != part.numel() * ranks:
            raise RuntimeError(
                f"{operation}: the whole tensor must have {part.numel()} values for each of {ranks} ranks "
                f"(got {of_whole} values)"
            )
        if first.dtype != part.dtype or first.device != part.device:
            raise RuntimeError(
                f"{operation}: tensors must have the same dtype and device (got {first.dtype} on "
                f"{first.device}, {part.dtype} on {part.device})"
            )

    # Collectives of tensors

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        return self._sent("all-reduce", tensor, group, async_op)

    def broadcast(
        self, tensor: torch.Tensor, src: Any = None, group: Any = None, async_op: bool = False, **_: Any
    ) -> Any:
        return self._sent("broadcast", tensor, group, async_op)

    def reduce(
        self,
        tensor: torch.Tensor,
        dst: Any = None,
        op: Any = None,
        group: Any = None,
        async_op: bool = False,
        **_: Any,
    ) -> Any:
        return self._sent("reduce", tensor, group, async_op)

    def all_gather_into_tensor(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        self._compare("all-gather", output_tensor, input_tensor, group)
        return self._sent("all-gather", output_tensor, group, async_op)

    def all_gather(
        self,
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        self._compare("all-gather", tensor_list, tensor, group)
        return self._sent("all-gather", tensor_list, group, async_op)

    def reduce_scatter_tensor(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # the name is torch's
        op: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        self._compare("reduce-scatter", input, output, group)
        return self._sent("reduce-scatter", input, group, async_op)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        self._compare("reduce-scatter", input_list, output, group)
        return self._sent("reduce-scatter", input_list, group, async_op)

    def gather(
        self,
        tensor: torch.Tensor,
        gather_list: Any = None,
        dst: Any = None,
        group: Any = None,
        async_op: bool = False,
        **_: Any,
    ) -> Any:
        return self._sent("gather", tensor, group, async_op)

    def scatter(
        self,
        tensor: torch.Tensor,
        scatter_list: Any = None,
        src: Any = None,
        group: Any = None,
        async_op: bool = False,
        **_: Any,
    ) -> Any:
        return self._sent("scatter", tensor, group, async_op)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # the name is torch's
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._sent("all-to-all", input, group, async_op)

    # Between two ranks

    def isend(self, tensor: torch.Tensor, dst: Any = None, group: Any = None, tag: int = 0, **_: Any) -> Any:
        return self._sent("send", tensor, group, True)

    def irecv(self, tensor: torch.Tensor, src: Any = None, group: Any = None, tag: int = 0, **_: Any) -> Any:
        return self._sent("receive", tensor, group, True)

    def send(self, tensor: torch.Tensor, dst: Any = None, group: Any = None, tag: int = 0, **_: Any) -> None:
        self._sent("send", tensor, group)

    def recv(self, tensor: torch.Tensor, src: Any = None, group: Any = None, tag: int = 0, **_: Any) -> int:
        self._sent("receive", tensor, group)
        return 0

    def batch_isend_irecv(self, p2p_op_list: list[Any]) -> list[Any]:
        names = {"isend": "send", "irecv": "receive"}
        return [self._sent(names[op.op.__name__], op.tensor, op.group, True) for op in p2p_op_list]

    # Of objects, and without data

    def barrier(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return self._record("barrier", group, "object", async_op, 0)

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        self._objects("all-gather of objects", group)
        object_list[:] = [obj] * len(object_list)

    def gather_object(
        self, obj: Any, object_gather_list: Any = None, dst: Any = None, group: Any = None, **_: Any
    ) -> None:
        self._objects("gather of objects", group)
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(self, object_list: Any, src: Any = None, group: Any = None, **_: Any) -> None:
        self._objects("broadcast of objects", group)

    def scatter_object_list(
        self, output_list: list[Any], input_list: Any, src: Any = None, group: Any = None, **_: Any
    ) -> None:
        self._objects("scatter of objects", group)
        output_list[0] = input_list[0] if input_list else None

    def _objects(self, operation: str, group: Any) -> None:
        self._record(operation, group, "object", False, 0)
        # The ranks first exchange the lengths of the pickled objects, which the host reads.
        self._activity.waits_for_device(operation)

    @contextlib.contextmanager
    def _coalescing_manager(
        self, group: Any = None, device: Any = None, async_ops: bool = False
    ) -> Iterator[_Work]:
        yield _Work()


def _at_wait(activity: Activity, call: Call, size: int) -> Callable[[], None]:
    """Returns the function to call when the host waits for a collective that has just started."""
    scope, started, is_awaited = activity.scope, activity.operations, False

    def awaited() -> None:
        nonlocal is_awaited
        if not is_awaited and activity.operations == started:
            activity.is_awaited_at_once(scope, call, size)
        is_awaited = True

    return awaited


def install(activity: Activity) -> None:
    """Replaces torch.distributed's functions, for the rest of this process."""
    module: Any = dist
    inner: Any = dist.distributed_c10d
    collectives = Collectives(activity)
    names = [name for name, value in vars(Collectives).items() if callable(value)]
    for name in names:
        if not name.startswith("_") or name == "_coalescing_manager":
            setattr(module, name, getattr(collectives, name))
            setattr(inner, name, getattr(collectives, name))
    module._all_gather_base = inner._all_gather_base = collectives.all_gather_into_tensor
    module._reduce_scatter_base = inner._reduce_scatter_base = collectives.reduce_scatter_tensor
    _patch_groups(activity, module, inner)
    # A P2POp checks the names of both point-to-point functions.
    module.isend.__func__.__name__, module.irecv.__func__.__name__ = "isend", "irecv"


def _patch_groups(activity: Activity, module: Any, inner: Any) -> None:
    start, make = module.init_process_group, module.new_group

    def init_process_group(
        backend: Any = None,
        *,
        rank: int = -1,
        world_size: int = -1,
        device_id: torch.device | None = None,
        **_: Any,
    ) -> None:
        own = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        start("fake", store=FakeStore(), rank=own[0], world_size=own[1])
        # Set the device here, because torch's own function does not accept it in a build without CUDA.
        inner._get_default_group().bound_device_id = device_id

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *_: Any, **more: Any) -> Any:
        activity.groups += 1
        is_split = inner._get_default_group().bound_device_id is not None
        if backend == "gloo" and is_split and len(ranks) < dist.get_world_size():
            raise RuntimeError(
                "new_group: would hang, because the default group was initialized with device_id: all "
                f"other ranks wait for the split of the default group, in which the {len(ranks)} ranks "
                "of a gloo group do not take part"
            )
        kept = {name: more[name] for name in ("group_desc", "use_local_synchronization") if name in more}
        return make(ranks, backend="fake", **kept)

    module.init_process_group = inner.init_process_group = init_process_group
    module.new_group = inner.new_group = new_group


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
