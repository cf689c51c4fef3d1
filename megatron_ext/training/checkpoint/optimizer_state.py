"""The optimizer's tensors in a format that depends neither on the parallel layout nor on the kind of optimizer.

For every parameter a checkpoint holds the two Adam moments and, in bf16 runs, the fp32 main weight. Each is a tensor of
the parameter's shape. Its name contains {name}, the parameter's global name:

    optimizer.state.exp_avg.{name}    optimizer.state.exp_avg_sq.{name}    optimizer.state.param.{name}  (bf16 only)

This is the distributed optimizer's `fully_reshardable` format without the copy of fp32 weights; here, the plain
optimizers use it as well. megatron-core's own code for this format is not used, for two reasons. First, that code
ignores the padding between gradient buckets: with several buckets, or with a word embedding that pipeline stages
share, parameters after a padded bucket are saved with their neighbours' state (seen in 0.16.1). Second, it cannot load
into torch's Adam. Learning rates are not stored: they follow from the configuration and the schedule. Adam's step
count is one number for all parameters, stored separately.

A parameter may already have been trained in a smaller model. Its attribute `earlier_steps` can then hold the number
of updates there, and torch's Adam continues to count from this number. Transformer Engine's and Apex's Adam ignore
this attribute: they keep one count per parameter group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_ext.training.interface.own_optimizer import OwnOptimizer

PREFIX = "optimizer.state."
MAIN_PARAM_PREFIX = f"{PREFIX}param."
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Held:
    """The part of one parameter's state on this rank: a range with the distributed optimizer, otherwise all of it."""

    model_param: torch.Tensor
    main_param: torch.Tensor
    """The tensor that the optimizer updates: the model's own, an fp32 copy, or a part of either."""
    tensors: dict[str, torch.Tensor]
    """The moments, and `param` if the optimizer does not update the model's own tensor."""
    start: int
    """Start of this rank's range in the flattened parameter."""
    end: int
    """End of this rank's range in the flattened parameter (exclusive)."""


class OptimizerState:
    """Converts the tensors of megatron-core's optimizer to and from a sharded state dict."""

    def __init__(self, optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> None:
        """Args:
        optimizer: an optimizer built by `get_megatron_optimizer`.
        model_state: the sharded state dict of all chunks of this rank.
        """
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parts = [part for part in parts if not part.is_stub_optimizer]
        shards = nested_values(extract_sharded_tensors_and_factories(model_state)[0])
        self._shards = {id(shard.data): (number, shard) for number, shard in enumerate(shards)}
        for part in self._parts:
            if not isinstance(part, OwnOptimizer):
                _fill_state(part)

    def step(self) -> int:
        """Returns Adam's step count; 0 on a rank without trainable parameters."""
        return max(map(_step, self._parts), default=0)

    def sharded(self, *, is_loading: bool, with_main_params: bool = True) -> dict[int, Any]:
        """Returns the optimizer's sharded state dict; collective.

        Args:
            is_loading: True if the state dict will be filled from a checkpoint, False if it will be saved.
            with_main_params: whether to include the main weights; otherwise `restore` copies them from the model.
        """
        state = {}
        for part in self._parts:
            for model_param, tensors in _whole(part, is_loading):
                if model_param.dtype == torch.float32 or not with_main_params:
                    tensors.pop("param", None)
                number, shard = self._shards[id(model_param)]
                if tensors:
                    state[number] = {name: _sharded(shard, name, tensors[name]) for name in tensors}
        return state

    @torch.no_grad()
    def restore(self, state: dict[int, Any], step: int) -> None:
        """Copies a loaded state dict into the optimizer; the model must have been loaded before.

        Args:
            state: the state dict from `sharded`, filled by megatron-core's loader; parameters that it lacks keep
                their current state.
            step: Adam's step count.
        """
        for part in self._parts:
            if isinstance(part, OwnOptimizer):
                self._restore_own(part, state, step)
                continue
            for held in _held(part):
                loaded = state.get(self._shards[id(held.model_param)][0])
                if loaded is None:
                    continue
                for name, tensor in held.tensors.items():
                    whole = loaded.get(name, held.model_param)
                    tensor.view(-1).copy_(whole.reshape(-1)[held.start : held.end])
            _set_step(part, step)

    def _restore_own(self, part: OwnOptimizer, state: dict[int, Any], step: int) -> None:
        for held in part.held():
            loaded = state.get(self._shards[id(held.parameter)][0], {})
            for name, tensor in held.tensors.items():
                whole = loaded.get(name, held.parameter)
                if whole.data_ptr() != tensor.data_ptr():  # otherwise it was read directly into its place
                    tensor.copy_(whole[held.start : held.end])
        part.restored(step)


def _sharded(
    shard: ShardedTensor | ShardedTensorFactory, name: str, tensor: torch.Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """Describes one tensor of a parameter's state for the checkpoint.

    The tensor has the parameter's shape, or the shape [rows, 1].
    """
    if isinstance(shard, ShardedTensorFactory) or tuple(tensor.shape) == tuple(shard.local_shape):
        return make_sharded_optimizer_tensor(shard, tensor.detach(), prefix=f"{PREFIX}{name}")
    # There is one number per row, which is equal on all ranks that hold a part of the row.
    part, copy = shard.global_offset[1] // shard.local_shape[1], shard.replica_id[-1]
    return ShardedTensor.from_rank_offsets(
        f"{PREFIX}{name}.{shard.key}", tensor.detach(), replica_id=(0, part, copy)
    )


def _held(part: MegatronOptimizer) -> Iterator[_Held]:
    if not isinstance(part, DistributedOptimizer):
        for model_param, main_param in _parameter_pairs(part):
            tensors = _tensors(part, main_param)
            if main_param is model_param:
                del tensors["param"]
            yield _Held(model_param, main_param, tensors, 0, model_param.numel())
        return
    for buffer_ranges in part.gbuf_ranges:
        for bucket_ranges in next(iter(buffer_ranges.values())):
            yield from _held_of_bucket(part, bucket_ranges)


def _held_of_bucket(part: DistributedOptimizer, bucket_ranges: dict[str, Any]) -> Iterator[_Held]:
    # megatron-core's `model_param_group_index_map` is wrong if a group has both bf16 and fp32 parameters.
    groups = (
        *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
    )
    mains = {id(low): main for lows, shards in groups for low, main in zip(lows, shards, strict=True)}
    for model_param, ranges in bucket_ranges["param_map"].items():
        main_param = mains[id(model_param)]
        tensors = _tensors(part, main_param)
        yield _Held(model_param, main_param, tensors, ranges["param"].start, ranges["param"].end)


def _tensors(part: MegatronOptimizer, main_param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"param": main_param, **{name: part.optimizer.state[main_param][name] for name in _MOMENTS}}


def _whole(
    part: MegatronOptimizer, is_loading: bool
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Yields each parameter with the tensors of its complete state.

    These are usually the optimizer's own tensors. With the distributed optimizer, they are gathered copies or, for
    loading, empty tensors to fill.
    """
    if isinstance(part, OwnOptimizer):
        yield from _to_fill(part) if is_loading else part.whole()
        return
    if isinstance(part, DistributedOptimizer) and not is_loading:
        for buffer, buffer_ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
            for bucket, ranges in zip(buffer.buckets, next(iter(buffer_ranges.values())), strict=True):
                yield from _gathered(part, buffer.param_index_map, bucket, ranges)
        return
    for held in _held(part):
        tensors = held.tensors
        if isinstance(part, DistributedOptimizer):
            tensors = {name: torch.empty(held.model_param.shape) for name in tensors}
        yield held.model_param, dict(tensors)


def _to_fill(part: OwnOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    for held in part.held():
        rows, tensors = len(held.parameter), held.tensors
        if held.end - held.start < rows:
            tensors = {name: torch.empty(rows, *tensor.shape[1:]) for name, tensor in tensors.items()}
        yield held.parameter, dict(tensors)


def _gathered(
    part: DistributedOptimizer, places: dict[torch.Tensor, Any], bucket: Any, ranges: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Yields a bucket's parameters with their gathered state, on the first data-parallel rank only."""
    # gloo gathers the copies in CPU memory. If the data-parallel group itself uses gloo, there is no separate gloo
    # group.
    group = part.data_parallel_group_gloo or part.data_parallel_group
    names = ("param", *_MOMENTS)
    own = torch.zeros(len(names), bucket.grad_data.numel() // group.size())
    for held, local in zip(_held_of_bucket(part, ranges), ranges["param_map"].values(), strict=True):
        for row, name in enumerate(names):
            own[row, local["gbuf_local"].start : local["gbuf_local"].end] = held.tensors[name].detach()
    first = group.rank() == 0
    pieces = [torch.empty_like(own) for _ in range(group.size())] if first else None
    dist.gather(own, pieces, dst=dist.get_process_group_ranks(group)[0], group=group)
    if pieces is None:
        return
    whole = torch.cat(pieces, dim=1)
    for model_param, (start, end, bucket_id) in places.items():
        if bucket_id == bucket.bucket_id:
            values = whole[:, start - bucket.offset : end - bucket.offset]
            yield model_param, {n: v.view(model_param.shape) for n, v in zip(names, values, strict=True)}


def _parameter_pairs(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields each parameter with the tensor that the optimizer updates: an fp32 copy or the parameter itself."""
    if hasattr(part, "fp32_from_float16_groups"):
        for low, main in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(low, main, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter) for parameter in group)
    else:
        yield from ((parameter, parameter) for parameter in part.get_parameters())


def _keeps_step_per_parameter(inner: torch.optim.Optimizer) -> bool:
    # torch's Adam keeps a step count per parameter; Transformer Engine's and Apex's keep one in the parameter group.
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _earlier_steps(model_param: torch.Tensor) -> int:
    return getattr(model_param, "earlier_steps", 0)


def _fill_state(part: MegatronOptimizer) -> None:
    """Creates the optimizer's state, filled with zeros; torch's Adam would create it only in the first step."""
    inner = part.optimizer
    part.init_state_fn(inner, part.config)
    if _keeps_step_per_parameter(inner):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if "step" not in inner.state[parameter]:
                    inner.state[parameter]["step"] = _step_tensor(group, parameter, 0)


def _step_tensor(group: dict[str, Any], parameter: torch.Tensor, step: int) -> torch.Tensor:
    on_device = bool(group.get("fused") or group.get("capturable"))
    return torch.tensor(float(step), dtype=torch.float32, device=parameter.device if on_device else "cpu")


def _step(part: MegatronOptimizer) -> int:
    if isinstance(part, OwnOptimizer):
        return part.step_count()
    inner = part.optimizer
    if _keeps_step_per_parameter(inner):
        steps = {
            int(inner.state[held.main_param]["step"].item()) - _earlier_steps(held.model_param)
            for held in _held(part)
        }
    else:
        steps = {int(group.get("step", 0)) for group in inner.param_groups if group["params"]}
    assert len(steps) <= 1, f"all parameters must have the same number of updates, found {sorted(steps)}"
    return max(steps, default=0)


def _set_step(part: MegatronOptimizer, step: int) -> None:
    inner = part.optimizer
    earlier = {id(held.main_param): _earlier_steps(held.model_param) for held in _held(part)}
    for group in inner.param_groups:
        if not _keeps_step_per_parameter(inner):
            group["step"] = step
            continue
        for parameter in group["params"]:
            count = step + earlier[id(parameter)]
            inner.state[parameter]["step"] = _step_tensor(group, parameter, count)
