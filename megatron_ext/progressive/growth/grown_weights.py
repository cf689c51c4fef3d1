"""Grows a model: loads the trunk from the smaller model's checkpoint, and initializes the new layers.

The trunk is the model before it grows. Its tensors are read from the sharded state dict by global name, with each
layer's number in the smaller model. Therefore, layers may move to other pipeline stages, and the parallel layout may
change.

The new layers' initial weights depend on --growth-init:

    random       initialized randomly, with another seed for each stack
    copy         copies of the neighbouring stack's layers, in order (repeated if the new stack has more layers)
    interleave   copies of layers distributed over the trunk: layer j of n is a copy of trunk layer floor(j L / n)
    zero         like random, but the output projections of attention and MLP are zero, so the new layers add nothing

A copied layer computes the same function as its source: the source's adapters are added to the copied weights, and the
new layer's own adapters start at zero. The trunk's parameters keep their optimizer state; new parameters have none.
"""

import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_ext.lora.adapter import LoRAAdapter
from megatron_ext.lora.parallel_linear import SettingsByLayer
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.models.layer_spec import LINEARS
from megatron_ext.platform.collectives import merge_over_ranks, on_every_rank
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.settings.progressive_config import GrowthInit
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint.optimizer_state import PREFIX, OptimizerState

_LAYER = re.compile(r"(?:(?<=\.)|^)layers\.(\d+)\.")
_NEW = "of_new_layers."
_OUTPUT_PROJECTIONS = (LINEARS[1], LINEARS[3])


def layer_of_name(name: str) -> int | None:
    """Returns the layer number in a tensor's global name; None if the name contains no layer."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def renamed(name: str, sources: Mapping[int, int]) -> str | None:
    """Returns the global name under which the trunk's checkpoint stores a tensor of the grown model.

    Args:
        name: the tensor's global name in the grown model.
        sources: maps layers of the grown model to those of the checkpoint.

    Returns:
        The name; None if the tensor belongs to a layer that is not in `sources`.
    """
    layer = layer_of_name(name)
    if layer is None:
        return name
    if layer not in sources:
        return None
    return _LAYER.sub(f"layers.{sources[layer]}.", name, count=1)


@torch.no_grad()
def read_trunk(chunks: list[GPTModel], folder: Path, sources: Mapping[int, int]) -> None:
    """Loads the weights that a model and the checkpoint of its trunk have in common; collective.

    Args:
        chunks: this rank's model chunks, unwrapped, before any weights are packed into four bits.
        folder: the checkpoint's directory.
        sources: maps the number of each trunk layer in the model to its number in the checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, a tensor is missing, or a tensor has the wrong shape.
    """
    tensors.verify(folder)
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
    """Sets the initial weights of the newest stack's layers, which must already be initialized randomly; collective.

    Args:
        chunks: this rank's model chunks, unwrapped, before any weights are packed into four bits.
        folder: directory of the trunk's checkpoint, already verified.
        rack: the stacks of the model.
        trunk: the stacks of the checkpoint.
        trunk_settings: the settings of the checkpoint's layers, by layer number, from which their adapters follow.
        how: the initialization; see the top of this file.
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
    """Maps the number of each new layer to the number of the trunk layer that it copies."""
    new = rack.layers_of(rack.newest.index)
    if how == "interleave":
        return {layer: place * trunk.num_layers // len(new) for place, layer in enumerate(new)}
    prepended = rack.stacks[0] is rack.newest
    neighbour = trunk.stacks[0] if prepended else trunk.stacks[-1]
    copied = trunk.layers_of(neighbour.index)
    return {layer: copied[place % len(copied)] for place, layer in enumerate(new)}


def _rounds(sources: Mapping[int, int]) -> list[dict[int, int]]:
    """Splits `sources` into parts; within each part, no source layer occurs twice."""
    # One read of a checkpoint cannot load the same tensor into two parameters.
    rounds: list[dict[int, int]] = []
    for layer, source in sources.items():
        free = next((part for part in rounds if source not in part.values()), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[layer] = source
    return rounds


def _name_in_trunk(sources: Mapping[int, int]) -> Callable[[str], str]:
    """Returns a function that maps global names to names in the checkpoint; for new layers, to names that it lacks."""
    return lambda name: renamed(name, sources) or f"{_NEW}{name}"


def _read_layers(
    chunks: list[GPTModel], folder: Path, sources: Mapping[int, int], *, everything: bool
) -> None:
    """Reads the layers in `sources`; with `everything`, also adapters and parameters that belong to no layer."""

    def wanted(name: str, _: torch.Tensor, stored: Container[str]) -> bool:
        if name.startswith(_NEW):
            return False
        if ADAPTERS in name.split("."):
            return everything and name in stored
        return everything or layer_of_name(name) is not None

    tensors.read_into(
        chunks, folder, wanted=wanted, rename=_name_in_trunk(sources), whole=False, same_vocabulary=True
    )


def _add_deltas(
    chunks: list[GPTModel], folder: Path, sources: Mapping[int, int], plan: SettingsByLayer
) -> None:
    """Adds the adapters of each source layer to the copied weights."""
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
    loaded = tensors.read(state, folder)
    for place, (linear, adapter) in enumerate(found):
        adapter.load_state_dict(loaded[str(place)])
        linear.weight += adapter.delta().to(linear.weight.dtype)


def parameters_with_state(chunks: list[GPTModel], folder: Path, sources: Mapping[int, int]) -> dict[str, int]:
    """Finds the trainable parameters whose optimizer state is in a checkpoint; sets their `earlier_steps`. Collective.

    Args:
        chunks: this rank's model chunks, unwrapped, with the untrained parameters already frozen.
        folder: directory of the trunk's checkpoint. Its `state.json` contains this function's result from the run that
            wrote the checkpoint, so that updates are counted over all phases.
        sources: maps the number of each trunk layer in the model to its number in the checkpoint.

    Returns:
        The number of Adam updates so far, by global name of the parameter.
    """
    state_file = on_every_rank(lambda: files.read_json(folder / files.STATE))
    steps = state_file["optimizer_step"]
    if steps is None:
        return {}
    earlier = state_file["families"]["progressive"]["earlier_steps"]
    stored = tensors.stored_shapes(folder)
    local: dict[str, int] = {}
    for chunk in tensors.model_state(chunks).values():
        for value in chunk.values():
            if not isinstance(value, ShardedTensor | ShardedTensorFactory):
                continue
            name = renamed(value.key, sources)
            if name is not None and f"{PREFIX}exp_avg.{name}" in stored and value.data.requires_grad:
                local[value.key] = value.data.earlier_steps = steps + earlier.get(name, 0)
    return merge_over_ranks(local)


def carry_optimizer_state(
    chunks: list[GPTModel], optimizer: MegatronOptimizer, folder: Path, sources: Mapping[int, int]
) -> None:
    """Loads the optimizer states of the trunk's parameters into the optimizer of a grown model; collective.

    `parameters_with_state` must have been called before the optimizer was built.

    Args:
        chunks: this rank's model chunks, unwrapped.
        optimizer: the new optimizer of these chunks.
        folder: directory of the trunk's checkpoint.
        sources: maps the number of each trunk layer in the model to its number in the checkpoint.
    """
    names = tensors.model_state(chunks, rename=_name_in_trunk(sources))
    tensors.load_optimizer(OptimizerState(optimizer, names), folder, 0, whole=False, same_vocabulary=True)
