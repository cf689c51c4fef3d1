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
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_ext.lora.adapter import LoRAAdapter
from megatron_ext.lora.trainable_layers import SettingsByLayer, adapted_linears
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


def _name_in_trunk(sources: Mapping[int, int]) -> Callable[[str], str]:
    """Tells the name that the checkpoint has for a global name; for a new layer's one that it does not have."""
    return lambda name: renamed(name, sources) or f"{_NEW}{name}"


def _read_layers(
    chunks: list[GPTModel], folder: Path, sources: Mapping[int, int], *, everything: bool
) -> None:
    """Reads layers from where `sources` says; with `everything` adapters and what lies outside the layers too."""

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
    loaded = tensors.read(state, folder)
    for place, (linear, adapter) in enumerate(found):
        adapter.load_state_dict(loaded[str(place)])
        linear.weight += adapter.delta().to(linear.weight.dtype)


def parameters_with_state(chunks: list[GPTModel], folder: Path, sources: Mapping[int, int]) -> dict[str, int]:
    """Marks the parameters that train and whose optimizer state a checkpoint holds; collective.

    Args:
        chunks: this rank's chunks, unwrapped, frozen where they are to be.
        folder: the trunk's checkpoint, in which the family's state has what this function gave for its own run.
        sources: number of each layer that the checkpoint has -> its number there.

    Returns:
        Global name -> Adam's updates so far, of all parameters in the model that have such a state.
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
    """Gives the optimizer of a grown model the states of the parameters that had one; collective.

    Call `parameters_with_state` before the optimizer is built.

    Args:
        chunks: this rank's chunks, unwrapped.
        optimizer: over them, new.
        folder: the trunk's checkpoint.
        sources: number of each layer that the checkpoint has -> its number there.
    """
    names = tensors.model_state(chunks, rename=_name_in_trunk(sources))
    tensors.load_optimizer(OptimizerState(optimizer, names), folder, 0, whole=False, same_vocabulary=True)
