"""The optimizer's tensors in a form that depends neither on the cut nor on which of the engine's optimizers has them.

Every parameter has its Adam moments, and in bf16 its fp32 main weight, under the parameter's own global name and shape:

    optimizer.state.exp_avg.{name}    optimizer.state.exp_avg_sq.{name}    optimizer.state.param.{name}  (bf16 only)

That is the distributed optimizer's `fully_reshardable` format, less the copy of fp32 weights; the plain optimizers are
put into it as well. Learning rates and the like are not in here: they follow from the configuration and the schedule.
Adam's step count is one number for all parameters and is kept apart.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

PREFIX = "optimizer.state."
MAIN_PARAM_PREFIX = f"{PREFIX}param."
_MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """Reads and writes the tensors of an engine optimizer."""

    def __init__(self, optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> None:
        """Args:
        optimizer: as `get_megatron_optimizer` makes it.
        model_state: the sharded state dict of this rank's model, all chunks.
        """
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parts = [part for part in parts if not part.is_stub_optimizer]
        self._model_state = model_state
        shards = list(nested_values(extract_sharded_tensors_and_factories(model_state)[0]))
        self._shards = {id(shard.data): shard for shard in shards}
        self._parameters = {shard.key: shard.data for shard in shards}
        for part in self._parts:
            _fill_state(part)

    def step(self) -> int:
        """Updates done so far, as Adam counts them; 0 on a rank without trainable parameters."""
        return max((_step(part.optimizer) for part in self._parts), default=0)

    def sharded(self, *, is_loading: bool, with_main_params: bool = True) -> dict[int, Any]:
        """The sharded state dict; collective.

        Args:
            is_loading: it is to be filled, else it is to be saved.
            with_main_params: False asks for moments only; main weights are then taken from the model.
        """
        state = {}
        for index, part in enumerate(self._parts):
            if isinstance(part, DistributedOptimizer):
                tensors = self._distributed(part, is_loading)
            else:
                tensors = {i: dict(entry) for i, entry in enumerate(self._plain(part))}
            for entry in tensors.values():
                if "param" in entry and not (with_main_params and self._is_low_precision(entry["param"])):
                    del entry["param"]
            state[index] = tensors
        return state

    def restore(self, state: dict[int, Any], step: int) -> None:
        """Takes a filled state dict of `sharded`; the model must have been restored before.

        Args:
            state: what the engine's loader gave.
            step: updates done so far, as Adam counts them.
        """
        for index, part in enumerate(self._parts):
            # A part without tensors on this rank leaves no trace in what was loaded.
            tensors = state.get(index, {})
            if isinstance(part, DistributedOptimizer):
                self._restore_distributed(part, tensors)
            else:
                _restore_plain(part, tensors)
            _set_step(part.optimizer, step)

    def _is_low_precision(self, shard: Any) -> bool:
        return self._parameters[shard.key.removeprefix(MAIN_PARAM_PREFIX)].dtype != torch.float32

    def _plain(self, part: MegatronOptimizer) -> Iterator[dict[str, Any]]:
        for model_param, main_param in _parameter_pairs(part):
            shard, state = self._shards[id(model_param)], part.optimizer.state[main_param]
            tensors = {name: state[name] for name in _MOMENTS}
            if main_param is not model_param:
                tensors["param"] = main_param
            yield {
                name: make_sharded_optimizer_tensor(shard, tensor.detach(), prefix=f"{PREFIX}{name}")
                for name, tensor in tensors.items()
            }

    def _distributed(self, part: DistributedOptimizer, is_loading: bool) -> dict[int, Any]:
        # The memory-efficient variant gathers on the first data-parallel rank only; the others have nothing to save.
        metadata = {"distrib_optim_fully_reshardable_mem_efficient": True}
        return part.sharded_param_state_fully_reshardable(self._model_state, is_loading, metadata) or {}

    def _restore_distributed(self, part: DistributedOptimizer, tensors: dict[int, Any]) -> None:
        for index, model_param in enumerate(_in_buffer_order(part)):
            tensors[index].setdefault("param", model_param.detach().float())
        # The loader copies each entry of a parameter's state and knows `step` in the parameter group only, where
        # torch's Adam does not keep it. So it is out of the way for the time of the call; `_set_step` puts it back.
        for state in part.optimizer.state.values():
            state.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(tensors)


def _restore_plain(part: MegatronOptimizer, tensors: dict[int, Any]) -> None:
    with torch.no_grad():
        for index, (model_param, main_param) in enumerate(_parameter_pairs(part)):
            loaded, state = tensors[index], part.optimizer.state[main_param]
            for name in _MOMENTS:
                state[name].copy_(loaded[name])
            if main_param is not model_param:
                main_param.copy_(loaded.get("param", model_param))


def _parameter_pairs(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's parameters and the weights that are updated: fp32 copies in bf16, else the same."""
    if hasattr(part, "fp32_from_float16_groups"):
        for low, main in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(low, main, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter) for parameter in group)
    else:
        yield from ((parameter, parameter) for parameter in part.get_parameters())


def _in_buffer_order(part: DistributedOptimizer) -> Iterator[torch.Tensor]:
    """The model's parameters in the order in which the format numbers them."""
    for buffer in part.buffers:
        yield from buffer.param_index_map


def _keeps_step_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """True for torch's Adam; Transformer Engine's and Apex's keep one step in the parameter group."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


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


def _step(inner: torch.optim.Optimizer) -> int:
    if _keeps_step_per_parameter(inner):
        steps = {int(state["step"].item()) for state in inner.state.values()}
    else:
        steps = {int(group.get("step", 0)) for group in inner.param_groups if group["params"]}
    assert len(steps) <= 1, f"parameters were updated unequally often: {sorted(steps)}"
    return max(steps, default=0)


def _set_step(inner: torch.optim.Optimizer, step: int) -> None:
    for group in inner.param_groups:
        if not _keeps_step_per_parameter(inner):
            group["step"] = step
            continue
        for parameter in group["params"]:
            inner.state[parameter]["step"] = _step_tensor(group, parameter, step)
