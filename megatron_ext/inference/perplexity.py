"""Measures the perplexity of a model on an indexed dataset.

    perplexity = exp( sum of -log p(token | earlier tokens in its window) / number of predicted tokens )

The dataset is one stream of tokens that is read in windows of the sequence length. Windows overlap by one token, so
every token except the very first is predicted exactly once. Dropout is off.

If the model's texts begin with a begin-of-text token (`bos`), every window begins with it and windows do not overlap;
then the very first token is predicted too. The bos token itself is context only and is never predicted, whether it
was added here or is in the data (unless bos is also the end-of-document token). A window that already begins with bos
gets no second bos.

A model family that masks tokens is evaluated on the masked tokens instead, and may return further values per token.
"""

import math
from collections.abc import Callable, Iterator
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

ReportTokens = Callable[[int], None]
"""Called during an evaluation with the number of tokens that all ranks have evaluated since the last call."""

_GUESS = "guess"


@dataclass(frozen=True)
class Begin:
    """The token that every evaluation window begins with."""

    token: int
    """Id of the begin-of-text token."""

    ends_documents: bool
    """Whether the token is also the end-of-document token; if so, it is predicted like any other token in the data."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The result of an evaluation."""

    loss: float
    """Mean negative log-likelihood per token in nats; a weighted mean if a model family gives tokens weights."""

    tokens: int
    """Number of predicted tokens, or the sum of their weights."""

    values: dict[str, float]
    """Further values that a model family's evaluation returns: the mean over the predicted tokens, by name."""

    guess_accuracy: float | None
    """Fraction of the predicted tokens that equal the token `guess`; None if no guess was given."""

    @property
    def perplexity(self) -> float:
        """The perplexity, exp(loss)."""
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
    progress: ReportTokens = lambda tokens: None,
) -> Perplexity:
    """Measures the perplexity; every rank evaluates its share of the windows and returns the same result. Collective.

    Args:
        chunks: this rank's model chunks.
        families: model families that the model is built with; they compute its inputs and the evaluation loss.
        prefix: path of the indexed dataset without `.bin` or `.idx`; the dataset must exist and be intact.
        sequence_length: tokens per window.
        micro_batch_size: windows per micro-batch.
        max_tokens: use only this many tokens from the beginning of the dataset; None uses all.
        guess: a token id whose frequency among the predicted tokens is measured as a baseline, or None.
        begin: the token that every window begins with, or None; must be None for a bidirectional model.
        progress: called after every micro-batch with its number of tokens on all ranks.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    steps = held_out_steps(prefix, sequence_length, micro_batch_size, max_tokens, begin, progress)
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
    # The first reduction adds up the ranks' windows; the second gives every pipeline stage the result of the last
    # one.
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
    progress: ReportTokens = lambda tokens: None,
) -> Iterator[list[Batch]]:
    """Yields this rank's micro-batches of a dataset in groups, with one micro-batch per pipeline stage in each group.

    `loss_mask` is 1 where a token is predicted, and 0 in the padding of short windows. If the last group is too short,
    it is filled up with micro-batches whose `loss_mask` is 0 everywhere.

    Args:
        prefix: path of the indexed dataset without `.bin` or `.idx`; the dataset must exist and be intact.
        sequence_length: tokens per window.
        micro_batch_size: windows per micro-batch.
        max_tokens: use only this many tokens from the beginning of the dataset; None uses all.
        begin: the token that every window begins with, or None.
        progress: called after every micro-batch with its number of tokens on all ranks.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    dataset = IndexedDataset(prefix)
    # Without `begin` the first token is not predicted.
    total = _predicted(dataset, prefix, max_tokens, begin) + (begin is None)
    if begin is None:
        windows = _windows(dataset, total, sequence_length)
    else:
        windows = _begun_windows(dataset, total, sequence_length, begin.token)
    never_asked = begin.token if begin is not None and not begin.ends_documents else None
    batches = _micro_batches(windows, sequence_length, micro_batch_size, never_asked, progress)
    return _by_step(batches, parallel_state.get_pipeline_model_parallel_world_size())


def held_out_tokens(prefix: str, max_tokens: int | None, begin: Begin | None) -> int:
    """Returns the number of tokens that `held_out_steps` with these arguments predicts on all ranks.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    return _predicted(IndexedDataset(prefix), prefix, max_tokens, begin)


def _predicted(dataset: IndexedDataset, prefix: str, max_tokens: int | None, begin: Begin | None) -> int:
    total = int(np.sum(dataset.sequence_lengths, dtype=np.int64))
    if total < 2:
        raise ValueError(f"{prefix}: the dataset must have at least 2 tokens, got {total}")
    predicted = total - (begin is None)
    return predicted if max_tokens is None else min(predicted, max_tokens)


def _by_step(batches: Iterator[Batch], stages: int) -> Iterator[list[Batch]]:
    while step := list(islice(batches, stages)):
        # The interleaved schedule requires a multiple of the number of stages; added micro-batches have a zero mask.
        while len(step) < stages:
            step.append({**step[0], "loss_mask": torch.zeros_like(step[0]["loss_mask"])})
        yield step


def _windows(
    dataset: IndexedDataset, total: int, length: int, first: int | None = None
) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """Yields windows of `length + 1` tokens that overlap by one; the last one may be shorter.

    The token `first`, if given, is put before the stream and does not count towards `total`.
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
    """Yields consecutive pieces of `length` tokens, of which the last may be shorter.

    A piece that does not begin with `bos` is preceded by it.
    """
    begin = np.array([bos])
    for window in _windows(dataset, total, length, first=bos):
        tokens = window[1:]  # the first token is the overlap with the window before
        yield tokens if tokens[0] == bos else np.concatenate([begin, tokens])


def _micro_batches(
    windows: Iterator[np.ndarray[Any, np.dtype[Any]]],
    length: int,
    micro_batch_size: int,
    never_asked: int | None,
    progress: ReportTokens,
) -> Iterator[Batch]:
    """Yields this data-parallel rank's micro-batches, equally many on every rank; padding has a zero loss mask."""
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
        progress(sum(len(window) - 1 for window in group))


class _WithGuess(OutputLoss):
    """Wraps an evaluation loss; also counts how often the token to predict equals a fixed guess."""

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
