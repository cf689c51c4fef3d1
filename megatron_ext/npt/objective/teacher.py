"""The teacher: the student's model with its NP components deactivated, run in an extra forward pass without gradients.

In this pass, the input of each NPT layer and that of the output layer are stored as fields of the micro-batch, on the
pipeline stage that owns the layer. Without pipeline parallelism, the teacher runs right before the student, one
micro-batch at a time. With pipeline parallelism, it runs through the pipeline schedule, once for all micro-batches of
the step.

A cache can keep these hidden states in host memory, so that later epochs reuse them. It is keyed by the tokens of each
sequence and has a size limit; states that do not fit are computed again.
"""

from collections.abc import Iterable, Iterator

import torch
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_ids import Id, sample_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.npt.modules.teacher_inputs import TEACHER, input_name
from megatron_ext.training.frozen_forward import FrozenForward, run_frozen
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import HiddenStates, NoLoss

OUTPUT = f"{TEACHER}/output"
"""Name of the batch field with the input of the teacher's output layer, [s, b, h] ([s/t, b, h] with sequence
parallelism)."""


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

    def find(self, batch: Batch, names: list[str]) -> dict[str, torch.Tensor] | None:
        """Returns a micro-batch's states from the cache; None unless every model-parallel rank has them. Collective."""
        if not self.max_bytes:
            return None
        rows = [self.states.get(key) for key in _keys(batch)]
        found = all(row is not None and row.keys() >= set(names) for row in rows)
        device = batch["tokens"].device
        if not all(self.agree([found], device)):
            return None
        return {name: torch.stack([row[name] for row in rows if row], 1).to(device) for name in names}

    def add(self, batch: Batch, states: dict[str, torch.Tensor]) -> None:
        """Stores a micro-batch's states, sequence by sequence, until the size limit is reached."""
        for row, key in enumerate(_keys(batch)):
            size = sum(state[:, row].nbytes for state in states.values())
            if self.bytes + size > self.max_bytes:
                return
            known = self.states.setdefault(key, {})
            for name, state in states.items():
                if name not in known:
                    known[name] = state[:, row].to("cpu", copy=True)
                    self.bytes += known[name].nbytes


class Teacher:
    """Runs the base model on the student's micro-batches."""

    def __init__(self, cache_bytes: int = 0) -> None:
        """Args:
        cache_bytes: size limit of the cache on this rank; 0 for no cache.
        """
        self.cache = TeacherCache(max_bytes=cache_bytes)

    def add_states(
        self,
        chunks: list[GPTModel],
        families: list[Family],
        batches: list[Batch],
        *,
        layers: tuple[int, ...],
        output: bool,
    ) -> Iterable[Batch]:
        """Adds the teacher's states to the micro-batches.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all model families of the run.
            batches: the micro-batches, on the device.
            layers: indices of the layers (on any pipeline stage) whose inputs are added.
            output: whether the output layer's input is added.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return self._one_by_one(chunks, families, batches, layers, output)
        states = _states(chunks, families, batches, layers, output)
        return [batch | of_batch for batch, of_batch in zip(batches, states, strict=True)]

    def _one_by_one(
        self,
        chunks: list[GPTModel],
        families: list[Family],
        batches: list[Batch],
        layers: tuple[int, ...],
        output: bool,
    ) -> Iterator[Batch]:
        names = [*map(input_name, layers), *([OUTPUT] if output else [])]
        for batch in batches:
            states = self.cache.find(batch, names)
            if states is None:
                (states,) = _states(chunks, families, [batch], layers, output)
                self.cache.add(batch, states)
            yield batch | states


def _states(
    chunks: list[GPTModel],
    families: list[Family],
    batches: list[Batch],
    layers: tuple[int, ...],
    output: bool,
) -> list[dict[str, torch.Tensor]]:
    """Returns, for each micro-batch, the teacher's states that this stage computes, by name of batch field."""
    # Take the input of the norm, not that of the layer, because a layer may first add something to its input.
    norms = {
        input_name(layer.layer_number - 1): layer.input_layernorm
        for chunk in chunks
        for layer in chunk.decoder.layers
        if layer.layer_number - 1 in layers
    }
    outputs = HiddenStates()
    with deactivated(chunks):
        states = run_frozen(chunks, families, batches, norms, outputs if output else NoLoss())
    if outputs.values:
        states = [known | {OUTPUT: value} for known, value in zip(states, outputs.values, strict=True)]
    return states


def _keys(batch: Batch) -> list[Id]:
    """Returns an id for each sequence: a digest of its tokens and positions."""
    return sample_ids(torch.cat([batch["tokens"], batch["position_ids"].expand_as(batch["tokens"])], dim=1))
