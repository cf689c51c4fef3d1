"""The optimizer's tensors in a form that depends neither on the cut nor on which of the engine's optimizers has them.

Every parameter has its Adam moments, and in bf16 its fp32 main weight, under the parameter's own global name and shape:

    optimizer.state.exp_avg.{name}    optimizer.state.exp_avg_sq.{name}    optimizer.state.param.{name}  (bf16 only)

That is the distributed optimizer's `fully_reshardable` format, less the copy of fp32 weights; the plain optimizers are
put into it as well. The engine's own code for it is not used: it forgets the padding between gradient buckets, so that
parameters after a padded bucket are saved with their neighbours' state (megatron-core 0.16.1, with several buckets, or
a word embedding that stages share), and it cannot load into torch's Adam. Learning rates and the like are not in here:
they follow from the configuration and the schedule. Adam's step count is one number for all parameters, kept apart.

A parameter that was trained before the run began, in a smaller model, may carry the updates of that time in its
attribute `earlier_steps`; torch's Adam then counts on from them. Transformer Engine's and Apex's count by group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

PREFIX = "optimizer.state."
MAIN_PARAM_PREFIX = f"{PREFIX}param."
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Held:
    """What this rank's optimizer holds of one parameter: all of it, or a range of the distributed optimizer's."""

    model_param: torch.Tensor
    main_param: torch.Tensor
    """The tensor that is updated: the model's own, a copy in fp32, or a part of either."""
    tensors: dict[str, torch.Tensor]
    """The moments, and `param` where the updated weights are not the model's own tensor."""
    start: int
    end: int
    """Range in the flattened parameter."""


class OptimizerState:
    """Reads and writes the tensors of an engine optimizer."""

    def __init__(self, optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> None:
        """Args:
        optimizer: as `get_megatron_optimizer` makes it.
        model_state: the sharded state dict of this rank's model, all chunks.
        """
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parts = [part for part in parts if not part.is_stub_optimizer]
        shards = nested_values(extract_sharded_tensors_and_factories(model_state)[0])
        self._shards = {id(shard.data): (number, shard) for number, shard in enumerate(shards)}
        for part in self._parts:
            _fill_state(part)

    def step(self) -> int:
        """Updates done so far, as Adam counts them; 0 on a rank without trainable parameters."""
        return max(map(_step, self._parts), default=0)

    def sharded(self, *, is_loading: bool, with_main_params: bool = True) -> dict[int, Any]:
        """The sharded state dict; collective.

        Args:
            is_loading: it is to be filled, else it is to be saved.
            with_main_params: False leaves out main weights; `restore` then takes them from the model.
        """
        state = {}
        for part in self._parts:
            for model_param, tensors in _whole(part, is_loading):
                if model_param.dtype == torch.float32 or not with_main_params:
                    tensors.pop("param", None)
                number, shard = self._shards[id(model_param)]
                state[number] = {
                    name: make_sharded_optimizer_tensor(shard, tensor.detach(), prefix=f"{PREFIX}{name}")
                    for name, tensor in tensors.items()
                }
        return state

    @torch.no_grad()
    def restore(self, state: dict[int, Any], step: int) -> None:
        """Takes a filled state dict of `sharded`; the model must have been restored before.

        Args:
            state: what the engine's loader gave; parameters that are left out in it keep the state that they have.
            step: updates done so far, as Adam counts them.
        """
        for part in self._parts:
            for held in _held(part):
                loaded = state.get(self._shards[id(held.model_param)][0])
                if loaded is None:
                    continue
                for name, tensor in held.tensors.items():
                    whole = loaded.get(name, held.model_param)
                    tensor.view(-1).copy_(whole.reshape(-1)[held.start : held.end])
            _set_step(part, step)


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
    # Not by the engine's `model_param_group_index_map`, which is wrong where a group has bf16 and fp32 parameters.
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
    """Parameters with their whole state: the optimizer's own tensors, or for the distributed one copies of them."""
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


def _gathered(
    part: DistributedOptimizer, places: dict[torch.Tensor, Any], bucket: Any, ranges: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """A bucket's parameters with their whole state, gathered on the first data-parallel rank; nothing on others."""
    # The copies are in the CPU's memory; where the group itself is gloo's there is no other.
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
    """The model's parameters and the weights that are updated: fp32 copies in bf16, else the same."""
    if hasattr(part, "fp32_from_float16_groups"):
        for low, main in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(low, main, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter) for parameter in group)
    else:
        yield from ((parameter, parameter) for parameter in part.get_parameters())


def _keeps_step_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """True for torch's Adam; Transformer Engine's and Apex's keep one step in the parameter group."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _earlier_steps(model_param: torch.Tensor) -> int:
    return getattr(model_param, "earlier_steps", 0)


def _fill_state(part: MegatronOptimizer) -> None:
    """Gives every parameter its (zero) state where no step was done yet, as torch's Adam does at the first step."""
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
    inner = part.optimizer
    if _keeps_step_per_parameter(inner):
        steps = {
            int(inner.state[held.main_param]["step"].item()) - _earlier_steps(held.model_param)
            for held in _held(part)
        }
    else:
        steps = {int(group.get("step", 0)) for group in inner.param_groups if group["params"]}
    assert len(steps) <= 1, f"parameters were updated unequally often: {sorted(steps)}"
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
