"""The teacher: the same weights with NP components off, run once more without gradients.

For every micro-batch it leaves the input of each NPT layer, and what the output layer reads, on the stage that owns
them, as further fields of the batch. Without pipeline parallelism it runs right before the student, one micro-batch at
a time; with it once for all micro-batches of the step, through the pipeline's own schedule.

The cache keeps states by the tokens of a sequence, so that a later epoch finds them, up to a size; what does not fit is
computed again. It is in the host's memory.
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
"""Batch field: what the output layer reads in the teacher, [s, b, h] ([s/t, b, h] under sequence parallel)."""


class TeacherCache(FrozenForward):
    """States by sequence, in the host's memory."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: largest size on this rank; 0 for no cache.
        """
        super().__init__()
        self.max_bytes = max_bytes
        self.bytes = 0
        """Present size."""

        self.states: dict[Id, dict[str, torch.Tensor]] = {}
        """Digest of a sequence's tokens -> its states, [s, h] each."""

    def find(self, batch: Batch, names: list[str]) -> dict[str, torch.Tensor] | None:
        """The states of a micro-batch, if every model-parallel rank has its part of every sequence; collective."""
        if not self.max_bytes:
            return None
        rows = [self.states.get(key) for key in _keys(batch)]
        found = all(row is not None and row.keys() >= set(names) for row in rows)
        device = batch["tokens"].device
        if not all(self.agree([found], device)):
            return None
        return {name: torch.stack([row[name] for row in rows if row], 1).to(device) for name in names}

    def add(self, batch: Batch, states: dict[str, torch.Tensor]) -> None:
        """Keeps a micro-batch's states while there is room."""
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
    """Runs the base model beside the student."""

    def __init__(self, cache_bytes: int = 0) -> None:
        """Args:
        cache_bytes: largest size of the cache on this rank.
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
        """The micro-batches with the teacher's states.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all families of the run.
            batches: the micro-batches, on the device.
            layers: numbers of the layers whose inputs are wanted, of any stage.
            output: what the output layer reads is wanted.
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
    """The states of each micro-batch that this stage owns, by the names of batch fields."""
    # The norm's input: before it a layer may add something of its own to what it gets.
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
    """Ids of the sequences, by their tokens and positions."""
    return sample_ids(torch.cat([batch["tokens"], batch["position_ids"].expand_as(batch["tokens"])], dim=1))
