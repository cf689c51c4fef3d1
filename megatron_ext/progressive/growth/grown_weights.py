"""Growing a model: what a larger model takes from the checkpoint of the smaller one, and how its new layers start.

Tensors are read through the sharded state dict by their global names, of which the layer's number is changed to the one
that the layer had in the smaller model; so layers may move between pipeline stages, and the cut may change.

    random       new layers as they are drawn, from a seed of their own
    copy         of the neighbouring stack, layer by layer (again from its first layer where the new one is longer)
    interleave   of trunk layers evenly taken from the whole trunk: layer j of n from trunk layer floor(j L / n)
    zero         random, but the output projections of attention and MLP zero: both add exactly nothing

A copied layer has the function of its source: the source's adapters are added to the copied weights, and the new
layer's own adapters begin at zero. Optimizer states go with the parameters that had one, and are none for the others.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_ext.lora.adapter import LoRAAdapter
from megatron_ext.lora.trainable_layers import SettingsByLayer, adapted_linears
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.models.layer_spec import LINEARS
from megatron_ext.platform.collectives import gather
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.settings.progressive_config import GrowthInit
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint.optimizer_state import MAIN_PARAM_PREFIX, PREFIX, OptimizerState

_LAYER = re.compile(r"(?:(?<=\.)|^)layers\.(\d+)\.")
_NEW = "of_new_layers."
_OUTPUT_PROJECTIONS = (LINEARS[1], LINEARS[3])


def layer_of_name(name: str) -> int | None:
    """Number of the layer in a global name, None where it has none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def renamed(name: str, sources: Mapping[int, int]) -> str | None:
    """A global name with the layer's number changed; None where `sources` does not have the layer."""
    layer = layer_of_name(name)
    if layer is None:
        return name
    if layer not in sources:
        return None
    return _LAYER.sub(f"layers.{sources[layer]}.", name, count=1)


@torch.no_grad()
def read_trunk(chunks: list[GPTModel], folder: Path, sources: Mapping[int, int]) -> None:
    """Gives a model the weights that it shares with a checkpoint; collective.

    Args:
        chunks: this rank's chunks, unwrapped, not yet packed.
        folder: the checkpoint.
        sources: number of each layer that the checkpoint has -> its number there.

    Raises:
        ValueError: the checkpoint is damaged, lacks a tensor, or has it in another shape.
    """
    gather(lambda: files.verify_checkpoint(folder, dist.get_rank(), dist.get_world_size()))
    _read_layers(chunks, folder, sources, everything=True)


@torch.no_grad()
def start_new_layers(
    chunks: list[GPTModel],
    folder: Path,
    rack: Rack,
    trunk: Rack,
    trunk_settings: SettingsByLayer,
    how: GrowthInit,
) -> None:
    """Gives the newest stack's layers, which are drawn already, their initial weights; collective.

    Args:
        chunks: this rank's chunks, unwrapped, not yet packed.
        folder: the trunk's checkpoint, verified.
        rack: the model's.
        trunk: the checkpoint's.
        trunk_settings: what the trunk's layers had there, for their adapters.
        how: see above.
    """
    new = rack.layers_of(rack.newest.index)
    if how == "zero":
        for chunk in chunks:
            for number, layer in zip(chunk.stage.layer_numbers, chunk.decoder.layers, strict=True):
                if number in new:
                    _zero_output_projections(layer)
    if how in ("copy", "interleave"):
        rounds = _rounds(_sources(rack, trunk, how))
        for sources in rounds:
            _read_layers(chunks, folder, sources, everything=False)
            _add_deltas(chunks, folder, sources, trunk_settings)


def _zero_output_projections(layer: torch.nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        parts = name.split(".")
        if len(parts) == 3 and parts[0] in ("self_attention", "mlp") and parts[1] in _OUTPUT_PROJECTIONS:
            parameter.zero_()


def _sources(rack: Rack, trunk: Rack, how: str) -> dict[int, int]:
    """Number of each new layer -> number in the trunk of the layer that it copies."""
    new = rack.layers_of(rack.newest.index)
    if how == "interleave":
        return {layer: place * trunk.num_layers // len(new) for place, layer in enumerate(new)}
    prepended = rack.stacks[0] is rack.newest
    neighbour = trunk.stacks[0] if prepended else trunk.stacks[-1]
    copied = trunk.layers_of(neighbour.index)
    return {layer: copied[place % len(copied)] for place, layer in enumerate(new)}


def _rounds(sources: Mapping[int, int]) -> list[dict[int, int]]:
    """The same in parts that take no layer twice: one reading asks for a tensor once."""
    rounds: list[dict[int, int]] = []
    for layer, source in sources.items():
        free = next((part for part in rounds if source not in part.values()), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[layer] = source
    return rounds


def _renamed_state(chunks: list[GPTModel], sources: Mapping[int, int]) -> dict[str, Any]:
    """The model's sharded tensors under the names that the checkpoint has for them; new layers' under no name of it."""
    state = tensors.model_state(chunks)
    for chunk in state.values():
        for name in [n for n, v in chunk.items() if not isinstance(v, ShardedTensor | ShardedTensorFactory)]:
            del chunk[name]
        for value in chunk.values():
            value.key = renamed(value.key, sources) or f"{_NEW}{value.key}"
    return state


def _read_layers(
    chunks: list[GPTModel], folder: Path, sources: Mapping[int, int], *, everything: bool
) -> None:
    """Reads layers from where `sources` says; with `everything` adapters and what lies outside the layers too."""
    stored = gather(lambda: tensors.stored_shapes(folder))[dist.get_rank()]
    state = _renamed_state(chunks, sources)
    for chunk in state.values():
        for name, value in list(chunk.items()):
            is_adapter = ADAPTERS in value.key.split(".")
            wanted = not value.key.startswith(_NEW) and not (is_adapter and value.key not in stored)
            if not everything:
                wanted = wanted and not is_adapter and layer_of_name(value.key) is not None
            if not wanted:
                del chunk[name]
    tensors.check(state, stored, folder, same_vocabulary=True, whole=False)
    tensors.load_model_state(chunks, _read(state, folder), strict=False)


def _add_deltas(
    chunks: list[GPTModel], folder: Path, sources: Mapping[int, int], plan: SettingsByLayer
) -> None:
    """Adds the adapters of the copied layers to the copies' weights."""
    metadata = ensure_metadata_has_dp_cp_group(dict(CHECKPOINT_METADATA))
    found: list[tuple[Any, LoRAAdapter]] = []
    state: dict[str, dict[str, Any]] = {}
    for number, name, module in adapted_linears(chunks):
        if number not in sources:
            continue
        linear: Any = module
        for adapter_name, shape in plan[sources[number]].adapters.items():
            adapter = LoRAAdapter(
                linear.config,
                linear.input_size,
                linear.output_size,
                shape,
                linear.tp_group,
                splits_input=linear.splits_input,
                is_gated=linear.is_gated,
            )
            prefix = f"decoder.layers.{sources[number]}.{name}.{ADAPTERS}.{adapter_name}."
            sharded = adapter.sharded_state_dict(prefix, (), metadata)
            state[str(len(found))] = {key.removeprefix(prefix): value for key, value in sharded.items()}
            found.append((linear, adapter))
    loaded = _read(state, folder)
    for place, (linear, adapter) in enumerate(found):
        adapter.load_state_dict(loaded[str(place)])
        linear.weight += adapter.delta().to(linear.weight.dtype)


def _read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`tensors.read`, where a rank, or every one, may want nothing."""
    if not any(gather(lambda: any(True for _ in nested_values(state)))):
        return state
    # The engine leaves out what is empty.
    return {**{name: {} for name in state}, **tensors.read(state, folder)}


def parameters_with_state(chunks: list[GPTModel], folder: Path, sources: Mapping[int, int]) -> dict[str, int]:
    """Marks the parameters that train and whose optimizer state a checkpoint holds; collective.

    Args:
        chunks: this rank's chunks, unwrapped, frozen where they are to be.
        folder: the trunk's checkpoint, in which the family's state has what this function gave for its own run.
        sources: number of each layer that the checkpoint has -> its number there.

    Returns:
        Global name -> Adam's updates so far, of all parameters in the model that have such a state.
    """
    state_file = gather(lambda: files.read_json(folder / files.STATE))[dist.get_rank()]
    steps = state_file["optimizer_step"]
    if steps is None:
        return {}
    earlier = state_file["families"]["progressive"]["earlier_steps"]
    stored = gather(lambda: tensors.stored_shapes(folder))[dist.get_rank()]
    local: dict[str, int] = {}
    for chunk in tensors.model_state(chunks).values():
        for value in chunk.values():
            if not isinstance(value, ShardedTensor | ShardedTensorFactory):
                continue
            name = renamed(value.key, sources)
            if name is not None and f"{PREFIX}exp_avg.{name}" in stored and value.data.requires_grad:
                local[value.key] = value.data.earlier_steps = steps + earlier.get(name, 0)
    return {name: count for part in gather(lambda: local) for name, count in part.items()}


def carry_optimizer_state(
    chunks: list[GPTModel], optimizer: MegatronOptimizer, folder: Path, sources: Mapping[int, int]
) -> None:
    """Gives the optimizer of a grown model the states of the parameters that had one; collective.

    Call `parameters_with_state` before the optimizer is built.

    Args:
        chunks: this rank's chunks, unwrapped.
        optimizer: over them, new.
        folder: the trunk's checkpoint.
        sources: number of each layer that the checkpoint has -> its number there.
    """
    stored = gather(lambda: tensors.stored_shapes(folder))[dist.get_rank()]
    state = OptimizerState(optimizer, _renamed_state(chunks, sources))
    main_params = any(name.startswith(MAIN_PARAM_PREFIX) for name in stored)
    wanted = {
        number: held
        for number, held in state.sharded(is_loading=True, with_main_params=main_params).items()
        if held["exp_avg"].key in stored
    }
    state.restore(_read({"optimizer": wanted}, folder)["optimizer"], 0)
