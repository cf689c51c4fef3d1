"""Runs the base model on calibration tokens: chooses the samples of each step, and observes the layers through hooks.

Every pass of the calibration reads the same samples, the first samples of the data.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.data.files.console import ProgressLines
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.output_with_bias import output_with_bias
from megatron_ext.npt.modules.key_value import centred
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import print_on_first_rank
from megatron_ext.training.interface.family_interface import Batch

UNIFORM = "calibration_uniform"
"""Name of the batch field with a uniform random number per token, [b, s] in fp64, from which its label is sampled."""


@dataclass
class Step:
    """Micro-batches of one run through the model."""

    batches: list[Batch]
    """The step's micro-batches, as many as there are pipeline stages."""

    kept: list[torch.Tensor]
    """For each micro-batch, a boolean mask [b] of the samples that count; the others only fill the last step."""

    samples: int
    """Number of samples over all data-parallel ranks, including those that do not count."""

    tokens: int
    """Number of tokens that count, over all data-parallel ranks."""


def calibration_steps(
    batches: Iterator[Batch], samples: int, seed: int = 0, *, name: str = "calibration"
) -> Iterator[Step]:
    """Yields steps until `samples` samples are read; further samples in the last step do not count.

    Args:
        batches: this data-parallel rank's micro-batches; the ranks' n-th micro-batches, in the order of the ranks, hold
            consecutive samples.
        samples: number of samples to use; further samples get a loss of zero.
        seed: seed of the sampled labels.
        name: name of this pass over the samples, for its progress.
    """
    lines = ProgressLines(name, samples, unit="samples", write=print_on_first_rank)
    first = 0
    while first < samples:
        step = _step(batches, first, samples, seed)
        yield step
        first += step.samples
        lines.advance(min(step.samples, samples - first + step.samples))


def _step(batches: Iterator[Batch], first: int, samples: int, seed: int) -> Step:
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    step, kept, count = list[Batch](), list[torch.Tensor](), 0
    for _ in range(parallel_state.get_pipeline_model_parallel_world_size()):
        batch = next(batches)
        size, length = batch["tokens"].shape
        numbers = [first + count + rank * size + row for row in range(size)]
        counts = torch.tensor([number < samples for number in numbers])
        uniform = [
            torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + number))
            for number in numbers
        ]
        names = ("tokens", "labels", "position_ids", DOCUMENT_STARTS)
        step.append(
            {
                **{name: batch[name] for name in names if name in batch},
                "loss_mask": counts.float().unsqueeze(1).expand(size, length),
                UNIFORM: torch.stack(uniform),
            }
        )
        kept.append(counts.to(process_groups.device()))
        count += size * copies
    return Step(step, kept, count, min(count, samples - first) * length)


@dataclass
class MLPInput:
    """Values in one layer of the base model when its MLP begins; [s, b, h] ([s/t, b, h] under SP) unless stated."""

    kept: torch.Tensor
    """Boolean mask [b] of the micro-batch's samples that count."""

    attention: torch.Tensor
    """The attention output a."""

    residual: torch.Tensor
    """h + a, the input of the MLP's norm."""

    normed: torch.Tensor
    """m = LN2(h + a)."""

    inverse_rms: torch.Tensor
    """1 / rms(h + a), [.., 1] in fp32."""


class LayerHooks:
    """Hooks on the chosen layers of one rank; subclasses process the observed values.

    Every layer runs the micro-batches in order; within a layer, attention runs before the MLP.
    """

    def __init__(self, chunks: list[GPTModel], layers: Collection[int]) -> None:
        """Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation.
        layers: indices of the layers, from 0; layers of other pipeline stages are ignored.
        """
        self.handles: list[Any] = []
        self.layers = [
            layer
            for layer in chain.from_iterable(chunk.decoder.layers for chunk in chunks)
            if layer.layer_number - 1 in layers
        ]
        self._attention: torch.Tensor
        self._kept: list[torch.Tensor] = []
        self._passes: dict[int, int] = {}
        """Maps each layer to the index of its current micro-batch."""
        for layer in self.layers:
            self._add(layer)

    def begin(self, step: Step) -> None:
        """Prepares for a step; must be called before the step runs."""
        self._kept, self._passes = step.kept, {}

    def kept(self, number: int) -> torch.Tensor:
        """Returns a boolean mask [b] of the samples that count in the current micro-batch of layer `number`."""
        return self._kept[self._passes[number]]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()

    def before_mlp(self, layer: Any, seen: MLPInput) -> None:
        """Called for each layer and micro-batch after the layer's second norm."""
        raise TypeError(f"{type(self).__name__} must implement before_mlp()")

    def _add(self, layer: Any) -> None:
        self.handles += [
            layer.self_attention.register_forward_hook(self._after_attention),
            layer.pre_mlp_layernorm.register_forward_hook(
                lambda norm, args, normed: self._after_norm(layer, args[0], normed)
            ),
        ]

    def _after_attention(self, _: Any, args: Any, returned: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        self._attention = output_with_bias(returned).detach()

    def _after_norm(self, layer: Any, x: torch.Tensor, normed: torch.Tensor) -> None:
        number = layer.layer_number - 1
        self._passes[number] = self._passes.get(number, -1) + 1
        square = centred(x.detach().float(), layer.config).square().mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(square + layer.config.layernorm_epsilon)
        self.before_mlp(layer, MLPInput(self.kept(number), self._attention, x, normed, inverse_rms))


def sum_over_ranks(parts: Iterable[torch.Tensor], sequence_parallel: bool) -> None:
    """Replaces each rank's sums over its own tokens with the sums over all tokens, in place. Collective."""
    groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
    if sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for part in parts:
        for group in groups:
            dist.all_reduce(part, group=group)
