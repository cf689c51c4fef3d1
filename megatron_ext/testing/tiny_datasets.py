"""Small indexed datasets and a small tokenizer for tests."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data.tokenizers import Tokenizer


def write_dataset(
    prefix: str, documents: Sequence[Sequence[Sequence[int]]], dtype: npt.DTypeLike = np.uint16
) -> None:
    """Writes a dataset with mcore's own builder.

    Args:
        prefix: path without `.bin` or `.idx`.
        documents: [documents][sequences][token ids]; an empty list of sequences is an empty document.
        dtype: integer type of the token ids in the file.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


class ListTokenizer(Tokenizer):
    """A tokenizer with a given list of pieces, in which `▁` stands for a leading space; splits text at white space."""

    def __init__(self, pieces: Sequence[str], eod: int = 0) -> None:
        self.pieces = list(pieces)
        self.vocab_size = len(pieces)
        self.eod = eod

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of the words that are in the vocabulary; other words are left out."""
        return [self.vocab[word] for word in text.split() if word in self.vocab]

    def detokenize(self, ids: list[int]) -> str:
        """Joins the pieces, with `▁` replaced by a space."""
        return "".join(self.pieces[token] for token in ids).replace("▁", " ")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """The vocabulary, which maps each piece to its id."""
        return {piece: number for number, piece in enumerate(self.pieces)}
