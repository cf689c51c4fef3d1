"""Builds training, validation and test sets: mcore's `GPTDataset`, blended, split and cached, with per-layer ids.

A sample holds `tokens`, `labels`, `loss_mask`, `position_ids`, each [s] (`labels[i]` is the token after
`tokens[i]`), `document_starts` [s] with `--reset-attention-mask` (`sample_documents`), and, when aligned per-layer
data is given, `per_layer_ids` [s]: the ids of `tokens`, read with the same document, sample and shuffle indices.
Without aligned data a sample has no such field; the per-layer ids are then computed per batch as `table[tokens]`.

After some errors mcore would hang or read garbage: a missing or truncated file, data from another tokenizer,
per-layer data that does not match, a split without documents (mcore would loop for ever), a failure on rank 0 (the
other ranks would wait at a barrier). These errors are found beforehand, and every rank raises the same one-line
error.

The key of mcore's cache of sample indices also contains the identity of the `.idx`, so data that is remade under the
same name never uses an outdated index; `index_cache` makes the cache safe to share.
"""

import copy
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.blends import Blends, blends_of, check_repeats, check_splits
from megatron_ext.data.datasets.index_cache import IN_MEMORY, choose_cache, through_cache
from megatron_ext.data.datasets.index_size import check_index_size
from megatron_ext.data.datasets.mock_data import build_mock_datasets
from megatron_ext.data.datasets.sample_documents import DocumentsConfig, document_settings, with_documents
from megatron_ext.data.indexed.manifest import check_dataset
from megatron_ext.data.per_layer.alignment import check_aligned, require_per_layer_files
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.platform.collectives import is_first_rank, on_every_rank, on_first_rank

_IDENTITY_BYTES = 1 << 20
Dataset = torch.utils.data.Dataset[dict[str, torch.Tensor]]


@dataclass
class AlignedGPTDatasetConfig(DocumentsConfig):
    """mcore's configuration of its datasets, extended by the per-layer data and the identities of the index files."""

    per_layer_prefixes: dict[str, str] | None = None
    """Maps the prefix of each main dataset to the prefix of its per-layer data; None without aligned data."""

    index_identities: dict[str, str] = field(default_factory=dict)
    """Maps the prefix of each main dataset to its index file's size and checksum."""


class AlignedGPTDataset(GPTDataset):
    """mcore's `GPTDataset`; adds `per_layer_ids` [s] int64 to every sample if the dataset has per-layer data."""

    config: AlignedGPTDatasetConfig

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str, *args: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        self._per_layer: AlignedGPTDataset | None = None
        if self.config.per_layer_prefixes is not None:
            # A shallow copy shares the arrays of sample indices, but reads the per-layer ids from another file.
            self._per_layer = copy.copy(self)
            self._per_layer.dataset = IndexedDataset(self.config.per_layer_prefixes[dataset_path])
            self._per_layer._pad_token_id = 0  # padded positions carry no loss

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Returns sample number `idx`. mcore passes None to pad a batch: the result is then sample 0 with all of its
        loss masked.
        """
        sample: dict[str, torch.Tensor] = with_documents(super().__getitem__(idx), self.config)
        if self._per_layer is not None:
            # Before 0.19 the engine returns two values, from 0.19 three.
            ids, *_ = self._per_layer._query_document_sample_shuffle_indices(0 if idx is None else idx)
            sample["per_layer_ids"] = torch.from_numpy(ids[: sample["tokens"].numel()])
        return sample

    def _build_document_sample_shuffle_indices(
        self,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Calls mcore's method, after adding the identity of the index file to the cache key."""
        self.unique_identifiers["index_identity"] = self.config.index_identities[self.dataset.path_prefix]
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda value: value.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        kinds = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")
        return through_cache(
            self, [f"{base}-{kind}" for kind in kinds], super()._build_document_sample_shuffle_indices
        )


class _Blend(BlendedDataset):
    """mcore's blend, with cache files that are written completely or not at all."""

    def _build_indices(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        kinds = ("description.txt", "dataset_index.npy", "dataset_sample_index.npy")
        return through_cache(self, [f"{base}-{kind}" for kind in kinds], super()._build_indices)


class _Builder(BlendedMegatronDatasetBuilder):
    """mcore's builder, except that an error on rank 0 is raised on every rank; with mcore's own, the other ranks wait
    forever.
    """

    @staticmethod
    def build_generic_dataset(  # the signature is mcore's
        cls: Callable[..., Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """Builds a dataset on rank 0, which writes the cache, and then on the other ranks, which read it."""
        if cls is BlendedDataset:
            cls = _Blend
            if not dist.is_initialized():
                # To cache a blend, mcore reads the rank; without a process group there is none, so the blend is not
                # cached.
                uncached = copy.copy(args[-1])
                uncached.path_to_cache = IN_MEMORY
                args = (*args[:-1], uncached)
        is_first = is_first_rank()
        dataset = on_every_rank(lambda: cls(*args) if is_first else None)
        return on_every_rank(lambda: dataset if is_first else cls(*args))

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: Any, sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        """Builds the datasets one after the other, each on rank 0 first; returns lists indexed [split][prefix]."""
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(of_split) for of_split in zip(*built, strict=True)]


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    seed: int,
    num_samples: tuple[int, int, int],
    tokenizer: Tokenizer,
    per_layer_data_path: tuple[str, ...] | list[str] | None = None,
    per_layer_strategy: str | None = None,
    per_layer_vocab_size: int | None = None,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Builds the training, validation and test sets; every rank calls it, with or without a process group.

    Args:
        data: blends, splits and cache.
        seq_length: s, the number of tokens per sample.
        seed: decides the order of documents and samples.
        num_samples: samples needed from (train, valid, test). The result is None for a set that needs 0 samples, or
            that has neither a share of --split nor its own path. A set repeats its documents, in a new random order
            each time, until it holds that many samples; a blend without weights is at most one epoch.
        tokenizer: the run's tokenizer.
        per_layer_data_path: prefixes of the per-layer data, in the order of the main prefixes (training, validation,
            test if these are given separately); weights that precede them must equal the main weights.
        per_layer_strategy: the strategy that the run uses; compared with the manifest of the per-layer data.
        per_layer_vocab_size: rows of the per-layer embedding; at least as many as the data has per-layer ids.

    Raises:
        FileNotFoundError, ValueError: the data has an error, named in one line; every rank raises the same line.
    """
    if data.mock_data:
        return build_mock_datasets(
            data, seq_length=seq_length, seed=seed, num_samples=num_samples, tokenizer=tokenizer
        )
    blends = blends_of(data, num_samples, per_layer_data_path)

    def check() -> None:
        for prefix in blends.prefixes():
            check_dataset(prefix, tokenizer)
        check_repeats(blends)
        check_splits(blends, seq_length)
        check_index_size(blends, seq_length)
        for prefix, per_layer in (blends.per_layer or {}).items():
            require_per_layer_files(prefix, per_layer)
            if is_first_rank():
                check_aligned(prefix, per_layer, strategy=per_layer_strategy, vocab_size=per_layer_vocab_size)

    on_every_rank(check)
    cache = choose_cache(data, blends.prefixes())
    config = _mcore_config(data, blends, seq_length, seed, tokenizer, cache)
    if config.split_matrix is not None:
        config.split_matrix = [
            bounds if wanted else None
            for bounds, wanted in zip(config.split_matrix, blends.num_samples, strict=True)
        ]
    builder = _Builder(AlignedGPTDataset, list(blends.num_samples), lambda: True, config)
    train, valid, test = builder.build()
    return train, valid, test


def _mcore_config(
    data: DataConfig, blends: Blends, seq_length: int, seed: int, tokenizer: Tokenizer, cache: str
) -> AlignedGPTDatasetConfig:
    """Returns mcore's configuration of the datasets."""
    return AlignedGPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=blends.blend,
        blend_per_split=blends.blend_per_split,
        split=data.split if blends.blend is not None else None,
        path_to_cache=cache,
        tokenizer=tokenizer,
        **document_settings(data),
        per_layer_prefixes=blends.per_layer,
        # Computing the identities reads every index file completely, so it is done once for all splits, on one rank.
        index_identities=on_first_rank(lambda: {prefix: _identity(prefix) for prefix in blends.prefixes()}),
    )


def _identity(prefix: str) -> str:
    """Returns the size and checksum of an index file, to recognize another file of the same name."""
    path = f"{prefix}.idx"
    checksum = 0
    with open(path, "rb") as stream:
        while block := stream.read(_IDENTITY_BYTES):
            checksum = zlib.crc32(block, checksum)
    return f"{os.path.getsize(path)}-{checksum:08x}"
