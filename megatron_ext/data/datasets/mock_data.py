"""`--mock-data`: megatron-core's synthetic documents, which need no files and are the same in every run.

A document counts upwards from token 1 and ends with the end-of-document token; its length is random, with a fixed seed.
"""

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.index_cache import silence_mcore
from megatron_ext.data.datasets.sample_documents import DocumentsConfig, document_settings, with_documents
from megatron_ext.data.tokenizers import Tokenizer


class _MockDataset(MockGPTDataset):
    """mcore's dataset of synthetic documents. Samples mark the beginnings of documents if attention is reset
    there.
    """

    config: DocumentsConfig

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Returns sample number `idx`. mcore passes None to pad a batch: the result is then sample 0 with all of its
        loss masked.
        """
        return with_documents(super().__getitem__(idx), self.config)


def build_mock_datasets(
    data: DataConfig, *, seq_length: int, seed: int, num_samples: tuple[int, int, int], tokenizer: Tokenizer
) -> tuple[MockGPTDataset | None, MockGPTDataset | None, MockGPTDataset | None]:
    """Builds the training, validation and test sets, each from a third of the documents.

    The arguments are those of `gpt_dataset.build_datasets`; the result is None for a set with 0 samples.
    """
    silence_mcore()
    config = DocumentsConfig(
        random_seed=seed, sequence_length=seq_length, tokenizer=tokenizer, **document_settings(data)
    )
    assert config.mock and config.split_matrix is not None  # because it has no blend
    config.split_matrix = [
        bounds if wanted else None for bounds, wanted in zip(config.split_matrix, num_samples, strict=True)
    ]
    train, valid, test = BlendedMegatronDatasetBuilder(
        _MockDataset, list(num_samples), lambda: True, config
    ).build()
    return train, valid, test
