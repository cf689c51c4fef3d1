"""Perplexity of a model on an indexed dataset.

    perplexity = exp( sum of -log p(token | tokens before it in its window) / number of tokens )

The dataset is read as one stream of tokens in windows of the sequence length; each window's first token is the last one
of the window before it, so that every token but the very first is predicted exactly once. Free-running, no dropout.

For a model whose texts begin with a begin-of-text token (`bos`) every window begins with it, then come the tokens that
follow those of the window before: every token is predicted exactly once, the very first too. The token itself is
context and never asked for, neither ours nor the data's own (unless it ends documents too); where a window of the data
begins with it, it is not put there twice.

A family that masks tokens asks for the masked ones instead, and may tell more of each token than its loss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family, make_batch
from megatron_ext.training.interface.output_losses import OutputLoss, select_output_loss

_GUESS = "guess"


@dataclass(frozen=True)
class Begin:
    """What every window of an evaluation begins with."""

    token: int
    """The begin-of-text token."""

    ends_documents: bool
    """It is the end-of-document token too, so where the data has it, it is asked for as any other."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The result of an evaluation."""

    loss: float
    """Mean negative log-likelihood a token, in nats; as a family weights its tokens."""

    tokens: int
    """Tokens predicted, or the sum of their weights."""

    values: dict[str, float]
    """Means over the same tokens of what a family's evaluation tells besides the loss, by its name."""

    guess_accuracy: float | None
    """How often the guess was the token asked for."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def evaluate_perplexity(
    chunks: list[Any],
    families: list[Family],
    prefix: str,
    *,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    guess: int | None = None,
    begin: Begin | None = None,
) -> Perplexity:
    """Measures the perplexity on every rank's share of the windows; all ranks get the result.

    Args:
        chunks: this rank's model chunks.
        families: asked for what the model is fed and asked, its auxiliary inputs, and values besides the loss.
        prefix: indexed dataset without `.bin` and `.idx`; it exists and is whole.
        sequence_length: tokens of a window.
        micro_batch_size: windows at a time.
        max_tokens: at most so many tokens, from the dataset's beginning.
        guess: a token that is compared with those asked for.
        begin: what every window begins with; None for nothing, and for a model that sees what lies ahead.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    steps = held_out_steps(prefix, sequence_length, micro_batch_size, max_tokens, begin)
    for chunk in chunks:
        chunk.eval()
    loss = select_output_loss(family.evaluation_loss() for family in families)
    loss = loss if guess is None else _WithGuess(loss, guess)
    sums = torch.zeros(len(loss.names), 2, dtype=torch.float64, device=process_groups.device())
    with torch.no_grad():
        for step in steps:
            made = [make_batch(families, batch) for batch in step]
            for output in run_microbatches(chunks, families, made, loss, forward_only=True):
                sums += torch.stack([output[name] for name in loss.names])
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    means = {name: float(total / weight) for name, (total, weight) in zip(loss.names, sums, strict=True)}
    return Perplexity(
        loss=means.pop("lm loss"),
        tokens=round(float(sums[loss.names.index("lm loss"), 1])),
        guess_accuracy=means.pop(_GUESS, None),
        values=means,
    )


def held_out_steps(
    prefix: str,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    begin: Begin | None = None,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of a dataset, as many at a time as the pipeline has stages.

    `loss_mask` is 1 where a token counts: windows that are short, or added to fill up, count less or nothing.

    Args:
        prefix: indexed dataset without `.bin` and `.idx`; it exists and is whole.
        sequence_length: tokens of a window.
        micro_batch_size: windows of a micro-batch.
        max_tokens: at most so many tokens, from the dataset's beginning.
        begin: what every window begins with, or None.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    dataset = IndexedDataset(prefix)
    total = int(np.sum(dataset.sequence_lengths, dtype=np.int64))
    if total < 2:
        raise ValueError(f"{prefix}: has {total} tokens, at least 2 are needed")
    if max_tokens is not None:
        total = min(total, max_tokens + (begin is None))
    if begin is None:
        windows = _windows(dataset, total, sequence_length)
    else:
        windows = _begun_windows(dataset, total, sequence_length, begin.token)
    never_asked = begin.token if begin is not None and not begin.ends_documents else None
    batches = _micro_batches(windows, sequence_length, micro_batch_size, never_asked)
    return _by_step(batches, parallel_state.get_pipeline_model_parallel_world_size())


def _by_step(batches: Iterator[Batch], stages: int) -> Iterator[list[Batch]]:
    while step := list(islice(batches, stages)):
        # The interleaved schedule wants the number of micro-batches to be a multiple of the stages.
        while len(step) < stages:
            step.append({**step[0], "loss_mask": torch.zeros_like(step[0]["loss_mask"])})
        yield step


def _windows(
    dataset: IndexedDataset, total: int, length: int, first: int | None = None
) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """The stream's windows of `length + 1` tokens, overlapping by one; the last may be shorter.

    A `first` token comes before the stream's own and does not count to its `total`.
    """
    buffer: list[np.ndarray[Any, np.dtype[Any]]] = [] if first is None else [np.array([first])]
    held, taken = len(buffer), 0
    for sequence in range(len(dataset.sequence_lengths)):
        if taken >= total:
            break
        tokens = dataset[sequence][: total - taken]
        taken += len(tokens)
        buffer.append(tokens)
        held += len(tokens)
        if held <= length:
            continue
        stream = np.concatenate(buffer)
        count = (held - 1) // length
        for window in range(count):
            yield stream[window * length : window * length + length + 1]
        buffer = [stream[count * length :]]
        held = len(buffer[0])
    if held > 1:
        yield np.concatenate(buffer)


def _begun_windows(
    dataset: IndexedDataset, total: int, length: int, bos: int
) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """The stream cut into pieces of `length` tokens, each begun with `bos`; the last may be shorter."""
    begin = np.array([bos])
    for window in _windows(dataset, total, length, first=bos):
        tokens = window[1:]  # the one before them belongs to the window before
        yield tokens if tokens[0] == bos else np.concatenate([begin, tokens])


def _micro_batches(
    windows: Iterator[np.ndarray[Any, np.dtype[Any]]],
    length: int,
    micro_batch_size: int,
    never_asked: int | None,
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches; every rank makes equally many, padded ones count nothing."""
    rank = parallel_state.get_data_parallel_rank()
    copies = parallel_state.get_data_parallel_world_size()
    while group := list(islice(windows, micro_batch_size * copies)):
        mine = group[rank * micro_batch_size : (rank + 1) * micro_batch_size]
        tokens = torch.zeros(micro_batch_size, length, dtype=torch.long)
        labels, mask = torch.zeros_like(tokens), torch.zeros(micro_batch_size, length)
        for row, window in enumerate(mine):
            values = torch.from_numpy(window.astype(np.int64))
            size = len(values) - 1
            tokens[row, :size], labels[row, :size], mask[row, :size] = values[:-1], values[1:], 1.0
            if never_asked is not None:
                mask[row, :size][values[1:] == never_asked] = 0.0
        yield {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "position_ids": torch.arange(length).expand(micro_batch_size, length),
        }


class _WithGuess(OutputLoss):
    """A family's evaluation, and how often a guessed token is the one asked for."""

    def __init__(self, of: OutputLoss, guess: int) -> None:
        self._of = of
        self._guess = guess
        self.reads = of.reads
        self.names = (*of.names, _GUESS)

    def of_tokens(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        guessed = batch["labels"] == self._guess, batch["loss_mask"] != 0
        return self._of.of_tokens(model, batch, output) | {_GUESS: guessed}
