"""The teacher: the student's model with its NP components deactivated, run in an extra forward pass without gradients.

In this pass, the inputs of the NPT layers and of the output layer are stored as fields of the micro-batch, on the
pipeline stage that owns the layer. Layer-parallel training also stores the layers' attention outputs and MLP outputs.
Without pipeline parallelism, the teacher runs right before the student, one micro-batch at a time. With pipeline
parallelism, it runs through the pipeline schedule, once for all micro-batches of the step.

A cache can keep these hidden states in host memory, so that later passes over the same samples reuse them. The keys
are digests of each sequence's tokens. The cache has a size limit; states that do not fit are computed again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_ids import Id, sample_ids
from megatron_ext.models.gpt_model import GPTModel, only_layers
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.npt.modules.teacher_inputs import TEACHER, input_name, state_names
from megatron_ext.training.frozen_forward import FrozenForward, ids_of_parts, run_frozen
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import HiddenStates, NoLoss

OUTPUT = f"{TEACHER}/output"
"""Name of the batch field with the input of the teacher's output layer, [s, b, h] ([s/t, b, h] with sequence
parallelism).
"""


class TeacherCache(FrozenForward):
    """Cache of the teacher's hidden states, by sequence, in host memory."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: size limit on this rank in bytes; 0 for no cache.
        """
        super().__init__()
        self.max_bytes = max_bytes
        self.bytes = 0
        """Current size in bytes."""

        self.states: dict[Id, dict[str, torch.Tensor]] = {}
        """Maps the digest of a sequence's tokens to the teacher's hidden states by name, each [s, h]."""

    def find(
        self, keys: list[list[Id]], names: list[str], device: torch.device
    ) -> list[dict[str, torch.Tensor]] | None:
        """Returns the states, moved to `device`; None unless every model-parallel rank has all of them. Collective.

        Args:
            keys: for each micro-batch, the ids of its sequences.
            names: names of the states.
            device: device of the result.
        """
        rows = [[self.states.get(key) for key in of_batch] for of_batch in keys]
        found = [all(row is not None and row.keys() >= set(names) for row in of_batch) for of_batch in rows]
        if not all(self.agree(found, device)):
            return None
        return [
            {name: torch.stack([row[name] for row in of_batch if row], 1).to(device) for name in names}
            for of_batch in rows
        ]

    def add(self, keys: list[Id], states: dict[str, torch.Tensor]) -> None:
        """Stores a micro-batch's states, sequence by sequence, until the size limit is reached."""
        for row, key in enumerate(keys):
            size = sum(state[:, row].nbytes for state in states.values())
            if self.bytes + size > self.max_bytes:
                return
            known = self.states.setdefault(key, {})
            for name, state in states.items():
                if name not in known:
                    known[name] = state[:, row].to("cpu", copy=True)
                    self.bytes += known[name].nbytes

    def clear(self) -> None:
        """Removes all states."""
        self.states.clear()
        self.bytes = 0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The teacher's states that a step reads."""

    layers: tuple[int, ...]
    """Indices of the layers (on any pipeline stage) whose states are read, from 0."""

    mlps: bool = False
    """Whether the layers' attention outputs and MLP outputs are read, in addition to their inputs."""

    output: bool = False
    """Whether the output layer's input is read."""

    dtype: torch.dtype | None = None
    """Dtype in which the states are stored; None for the model's own dtype."""

    def names(self, chunks: list[GPTModel]) -> list[str]:
        """Returns the names of the batch fields that this pipeline stage adds."""
        own = [number for chunk in chunks for number in chunk.stage.layer_numbers if number in self.layers]
        of_layers = [name for layer in own for name in state_names(layer)[: 3 if self.mlps else 1]]
        return [*of_layers, *([OUTPUT] if self.output and chunks[-1].stage.is_last else [])]


class Teacher:
    """Runs the base model on the student's micro-batches."""

    def __init__(self, cache_bytes: int = 0) -> None:
        """Args:
        cache_bytes: size limit of the cache on this rank; 0 for no cache.
        """
        self.cache = TeacherCache(max_bytes=cache_bytes)

    def add_states(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch], wanted: Wanted
    ) -> Iterable[Batch]:
        """Adds the teacher's states to the micro-batches.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all model families of the run.
            batches: the micro-batches, on the device.
            wanted: the states to add; a pipeline stage adds those of its own layers.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            # The generator keeps no reference to a micro-batch's states, so they can be freed before the next ones
            # are computed.
            return (self._with_states(chunks, families, [batch], wanted).pop() for batch in batches)
        return self._with_states(chunks, families, batches, wanted)

    def _with_states(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch], wanted: Wanted
    ) -> list[Batch]:
        # Compute no digests without a cache, because the host would have to wait for the tokens.
        keys = _keys(batches) if self.cache.max_bytes else []
        states = self.cache.find(keys, wanted.names(chunks), batches[0]["tokens"].device) if keys else None
        if states is None:
            states = [
                {name: state.to(wanted.dtype or state.dtype) for name, state in of_batch.items()}
                for of_batch in _states(chunks, families, batches, wanted)
            ]
            for of_batch, computed in zip(keys, states, strict=False):
                self.cache.add(of_batch, computed)
        return [batch | of_batch for batch, of_batch in zip(batches, states, strict=True)]


def _states(
    chunks: list[GPTModel], families: list[Family], batches: list[Batch], wanted: Wanted
) -> list[dict[str, torch.Tensor]]:
    """Returns, for each micro-batch, the teacher's states that this stage computes, by name of batch field."""
    layers = {
        layer.layer_number - 1: layer
        for chunk in chunks
        for layer in chunk.decoder.layers
        if layer.layer_number - 1 in wanted.layers
    }
    # Take the input of the norm instead of the layer's input, because a layer may first add a tensor to its input.
    inputs = {input_name(number): layer.input_layernorm for number, layer in layers.items()}
    inner: dict[str, torch.nn.Module] = {}
    if wanted.mlps:
        for number, layer in layers.items():
            _, attention, mlp = state_names(number)
            inner |= {attention: layer.self_attention, mlp: layer.mlp}
    outputs = HiddenStates()
    # If the output is not needed, the layers above the last wanted one need not run.
    end = None if wanted.output else max(wanted.layers) + 1
    with deactivated(chunks), only_layers(chunks, end=end):
        states = run_frozen(chunks, families, batches, inputs, outputs if wanted.output else NoLoss(), inner)
    if outputs.values:
        states = [known | {OUTPUT: value} for known, value in zip(states, outputs.values, strict=True)]
    return states


def _keys(batches: list[Batch]) -> list[list[Id]]:
    """Returns, for each micro-batch, an id for each sequence: a digest of its tokens and positions.

    Collective over the context-parallel ranks.
    """
    device = batches[0]["tokens"].device
    read = [
        torch.cat([batch["tokens"], batch["position_ids"].expand_as(batch["tokens"])], dim=1)
        for batch in batches
    ]
    rows = torch.stack(read).cpu()  # one copy from the device for all
    return [ids_of_parts(sample_ids(of_batch), device) for of_batch in rows]
