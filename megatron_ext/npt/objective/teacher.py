"""The teacher: the same model with NP components deactivated, run once more without gradients.

It adds the input of each NPT layer and the output layer's input to every micro-batch, as fields on the stage that owns
the layer. Without pipeline parallelism it runs right before the student, one micro-batch at a time; with pipeline
parallelism it runs through the schedule, once for all micro-batches of the step.

The cache keeps states in host memory, up to a given size, under the tokens of their sequence, so that a later epoch
finds them. States that do not fit are recomputed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_ids import Id, sample_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import ExtendedTransformerLayer
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.npt.modules.teacher_inputs import TEACHER, input_name
from megatron_ext.training.engine.microbatches import run_directly, run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import HiddenStates

OUTPUT = f"{TEACHER}/output"
"""Name of the batch field with the teacher's output-layer input, [s, b, h] ([s/t, b, h] under sequence parallel)."""


@dataclass
class TeacherCache:
    """Cache of the teacher's states by sequence, in host memory."""

    max_bytes: int
    """Size limit on this rank; 0 for no cache."""

    states: dict[Id, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Digest of a sequence's tokens -> its states, each [s, h]."""

    bytes: int = 0
    """Current size."""

    hits: int = 0
    """Number of micro-batches found in the cache."""

    misses: int = 0
    """Number of micro-batches not found."""

    was_skipped: bool = False
    """Whether the last micro-batch was found, so that the teacher's pass was skipped."""

    def find(self, batch: Batch, names: list[str]) -> dict[str, torch.Tensor] | None:
        """Returns the states of a micro-batch, or None unless every model-parallel rank has all of them; collective."""
        if not self.max_bytes:
            return None
        rows = [self.states.get(key) for key in _keys(batch)]
        found = all(row is not None and row.keys() >= set(names) for row in rows)
        agreed = torch.tensor([found], dtype=torch.int32, device=batch["tokens"].device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
        self.was_skipped = bool(agreed)
        if not self.was_skipped:
            self.misses += 1
            return None
        self.hits += 1
        device = batch["tokens"].device
        return {name: torch.stack([row[name] for row in rows if row], 1).to(device) for name in names}

    def add(self, batch: Batch, states: dict[str, torch.Tensor]) -> None:
        """Stores a micro-batch's states as long as they fit."""
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
            families: all families of the run.
            batches: the micro-batches, on the device.
            layers: numbers of the layers, of any stage, whose inputs are added.
            output: whether the output layer's input is added.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return self._one_by_one(chunks, families, batches, layers, output)
        states = _through_pipeline(chunks, families, batches, layers, output)
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
                states = _directly(chunks[0], families, batch, layers, output)
                self.cache.add(batch, states)
            yield batch | states


@torch.no_grad()
def _directly(
    chunk: GPTModel, families: list[Family], batch: Batch, layers: tuple[int, ...], output: bool
) -> dict[str, torch.Tensor]:
    recorder = _Recorder([chunk], layers)
    with recorder, deactivated([chunk]):
        hidden_states = run_directly(chunk, families, batch)
    states = {name: values[0] for name, values in recorder.values.items()}
    return states | ({OUTPUT: hidden_states} if output else {})


@torch.no_grad()
def _through_pipeline(
    chunks: list[GPTModel],
    families: list[Family],
    batches: list[Batch],
    layers: tuple[int, ...],
    output: bool,
) -> list[dict[str, torch.Tensor]]:
    outputs = HiddenStates()
    recorder = _Recorder(chunks, layers)
    with recorder, deactivated(chunks):
        run_microbatches(chunks, families, batches, outputs, forward_only=True)
    states = [
        {name: values[index] for name, values in recorder.values.items()} for index in range(len(batches))
    ]
    if output and outputs.values:
        states = [s | {OUTPUT: value} for s, value in zip(states, outputs.values, strict=True)]
    return states


class _Recorder:
    """Context that records the inputs of layers, one list per layer, with dropout switched off."""

    def __init__(self, chunks: list[GPTModel], layers: tuple[int, ...]) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self._chunks = chunks
        self._layers = layers

    def __enter__(self) -> None:
        self._training = [chunk.training for chunk in self._chunks]
        self._hooks = []
        for chunk in self._chunks:
            chunk.eval()
            for layer in chunk.decoder.layers:
                assert isinstance(layer, ExtendedTransformerLayer)
                if layer.layer_number - 1 in self._layers:
                    kept = self.values.setdefault(input_name(layer.layer_number - 1), [])
                    hook = layer.input_layernorm.register_forward_pre_hook(
                        lambda _, inputs, kept=kept: kept.append(inputs[0])
                    )
                    self._hooks.append(hook)

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for chunk, training in zip(self._chunks, self._training, strict=True):
            chunk.train(training)


def _keys(batch: Batch) -> list[Id]:
    """Returns ids of the sequences, digests of their tokens and positions."""
    return sample_ids(torch.cat([batch["tokens"], batch["position_ids"].expand_as(batch["tokens"])], dim=1))
