"""Builds a run's datasets and iterates over their micro-batches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.datasets.gpt_dataset import Dataset, build_datasets
from megatron_ext.data.datasets.repeated_samples import RepeatedDataset
from megatron_ext.data.datasets.samplers import build_data_iterator
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.loop import Data
from megatron_ext.training.run_options import RunOptions


def training_samples(training: TrainingConfig, global_batch_size: int, options: RunOptions) -> int:
    """Returns the number of sequences in the training set: those that the run trains on, each counted once if epochs
    are repeated.
    """
    taken = options.samples or training.resolved_train_samples(global_batch_size)
    if options.epoch_samples is None:
        return taken
    epochs = -(-taken // (options.epoch_samples * options.epoch_repeats)) if options.epoch_repeats else 1
    return min(taken, options.epoch_samples * epochs)


def build_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    families: list[Family],
    global_batch_size: int,
    run_options: RunOptions,
) -> Data:
    """Builds the run's training, validation and test batches, with fields from the model families' own data files.

    Raises:
        FileNotFoundError, ValueError: the data is missing or unsuitable; every rank raises the same one-line error.
    """
    training = config.training
    options: dict[str, Any] = {}
    for family in families:
        options |= family.dataset_options()
    evaluated = training.eval_iters * global_batch_size
    trained = run_options.samples or training.resolved_train_samples(global_batch_size)
    train, valid, test = build_datasets(
        config.data,
        seq_length=config.model.seq_length,
        seed=training.seed,
        num_samples=(
            training_samples(training, global_batch_size, run_options),
            evaluated,
            evaluated,
        ),
        tokenizer=tokenizer,
        **options,
    )
    if train is None:
        raise ValueError(f"--split {config.data.split} leaves no training data; make its first number larger")
    if run_options.epoch_samples is not None:
        train = RepeatedDataset(
            train,
            epoch_samples=run_options.epoch_samples,
            block=training.micro_batch_size * parallel_state.get_data_parallel_world_size(),
            num_samples=trained,
            seed=training.seed,
            repeats=run_options.epoch_repeats,
        )
    batches = partial(_batches, training.micro_batch_size, config.data.num_workers, tokenizer.vocab_size)
    return Data(
        train=partial(batches, train),
        valid=partial(batches, valid) if valid is not None else None,
        test=partial(batches, test) if test is not None else None,
    )


def _batches(
    micro_batch_size: int, num_workers: int, vocab_size: int, dataset: Dataset, consumed_samples: int
) -> Iterator[Batch]:
    """Yields micro-batches without end; the field `epoch` [b] is the number of times that each sequence was read
    before.

    Raises:
        ValueError: a token id is not in the tokenizer's vocabulary.
    """
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = build_data_iterator(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=copies,
        num_workers=num_workers,
    )
    numbers = torch.arange(micro_batch_size) + consumed_samples + rank * micro_batch_size
    for batch in batches:
        largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
        if largest >= vocab_size:
            raise ValueError(
                f"the data contains token id {largest}, but the tokenizer's vocabulary has only {vocab_size} ids; pass "
                "the tokenizer with which the data was prepared (--tokenizer-type, --tokenizer-model, --vocab-file)"
            )
        yield {"epoch": numbers // len(dataset), **batch}  # type: ignore[arg-type]  # torch declares no __len__
        numbers += micro_batch_size * copies
