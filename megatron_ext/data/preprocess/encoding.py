"""Encodes batches of text into one flat array of ids, with the library `gigatoken` if it gives the same ids as the
tokenizer, otherwise with the tokenizer itself.

`gigatoken` encodes byte-level BPE about ten times faster than the tokenizer's own library, but it is a different
implementation. gigatoken is used only if the tokenizer.json has no setting that gigatoken ignores (see
`gigatoken.py`), and if its ids equal the tokenizer's own on a sample of the input, on texts that contain every added
token, and on `PROBE_TEXTS`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_ext.data.preprocess.gigatoken import added_token_texts, left_out, load
from megatron_ext.data.tokenizers.tokenizer import PROBE_TEXTS, Tokenizer

_BATCH_CHARACTERS = 256 << 10
_CACHE_BYTES = 160 << 20

EncoderName = Literal["gigatoken", "reference"]
Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Choice:
    """The chosen encoder and the reason for the choice; both are shown to the user."""

    encoder: EncoderName
    reason: str


class Encoder:
    """Encodes texts with gigatoken or with the tokenizer's own library.

    gigatoken is called text by text: its batch call returns an `awkward` array, whose import and bookkeeping cost
    more. gigatoken caches every word without limit, so gigatoken is loaded again when this process has grown by
    `_CACHE_BYTES`; this does not change the ids.

    Args:
        tokenizer: the tokenizer, with its own library (the reference).
        name: the implementation to use; "gigatoken" only if `choose_encoder` chose it.
        fast: gigatoken's tokenizer, if it is loaded already.
    """

    def __init__(self, tokenizer: Tokenizer, name: EncoderName, fast: Any = None) -> None:
        self._tokenizer = tokenizer
        self._fast = fast or (load(tokenizer) if name == "gigatoken" else None)
        # Measured at the first batch, so that a worker forked from this process measures its own memory.
        self._bytes_when_loaded: int | None = None

    def encode(self, texts: list[str]) -> Iterator[tuple[Ids, Ids]]:
        """Yields `(ids, lengths)` for a batch of texts at a time, in order: all their ids, and each text's length.

        The ids include the tokenizer's `text_frame`.
        """
        for batch in _batches(texts):
            if self._fast is not None:
                self._forget()
                encoded = _join([self._fast.encode(text) for text in batch])
            else:
                encoded = _flatten(self._tokenizer.tokenize_batch(batch))
            yield _framed(*encoded, *self._tokenizer.text_frame)

    def _forget(self) -> None:
        """Loads gigatoken again if its cache has become large, which frees the cache."""
        if self._bytes_when_loaded is None:
            self._bytes_when_loaded = resident_bytes()
        if resident_bytes() - self._bytes_when_loaded > _CACHE_BYTES:
            self._fast = None  # free the old one before the new one is loaded
            self._fast = load(self._tokenizer)
            # Do not count memory that other code has allocated meanwhile: it would cause a reload at every batch.
            self._bytes_when_loaded = max(self._bytes_when_loaded, resident_bytes() - _CACHE_BYTES // 2)


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes; 0 if it is not known (outside Linux)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def choose_encoder(
    tokenizer: Tokenizer, wanted: Literal["auto", "gigatoken", "reference"], sample: list[str]
) -> tuple[Encoder, Choice]:
    """Compares gigatoken with the reference on a sample; returns the encoder to use, and why.

    Raises:
        ValueError: `wanted` is "gigatoken", but it cannot be used.
    """
    name = type(tokenizer).__name__
    if wanted == "reference":
        return Encoder(tokenizer, "reference"), Choice("reference", f"{name}'s own library, as asked")
    fast, refusal = _load_or_refuse(tokenizer)
    refusal = refusal or _difference(tokenizer, fast, sample)
    if refusal is None:
        reason = f"a fast library; its ids equal {name}'s on {len(sample)} sampled documents"
        return Encoder(tokenizer, "gigatoken", fast), Choice("gigatoken", reason)
    if wanted == "gigatoken":
        raise ValueError(f"--encoder gigatoken: {refusal}")
    return Encoder(tokenizer, "reference"), Choice("reference", f"{name}'s own library: {refusal}")


def _load_or_refuse(tokenizer: Tokenizer) -> tuple[Any, str | None]:
    """Returns gigatoken's tokenizer and None, or None and the reason why there is none."""
    try:
        source = tokenizer.gigatoken_source()
        refusal = None if source is None else left_out(source)
        fast = None if refusal is not None else load(tokenizer)
    except ModuleNotFoundError:
        return None, "gigatoken is not installed"
    except Exception as error:  # the library raises exceptions of several kinds
        reason = str(error).partition("\n")[0]
        return None, f"gigatoken cannot load this tokenizer ({reason})"
    if refusal is not None:
        return None, f"gigatoken does not implement {refusal}"
    return fast, None if fast is not None else "gigatoken does not support this tokenizer"


def _difference(tokenizer: Tokenizer, fast: Any, sample: list[str]) -> str | None:
    """Describes the first difference between gigatoken's ids and the reference's; None if they are equal."""
    for text in chain(sample, PROBE_TEXTS, ("",), added_token_texts(tokenizer)):
        if fast.encode(text).tolist() != tokenizer.tokenize(text):
            return f"gigatoken's ids differ on a sampled text that begins {text[:40]!r}"
    return None


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Divides texts into batches of at most `_BATCH_CHARACTERS`, to save memory; a longer text is a batch alone."""
    begin, characters = 0, 0
    for position, text in enumerate(texts):
        if characters and characters + len(text) > _BATCH_CHARACTERS:
            yield texts[begin:position]
            begin, characters = position, 0
        characters += len(text)
    if begin < len(texts):
        yield texts[begin:]


def _join(encoded: list[Ids]) -> tuple[Ids, Ids]:
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return np.concatenate(encoded), lengths


def _framed(ids: Ids, lengths: Ids, before: list[int], after: list[int]) -> tuple[Ids, Ids]:
    """Puts the ids `before` in front of each text, and the ids `after` behind it."""
    if after:
        ids = np.insert(ids, np.repeat(np.cumsum(lengths), len(after)), np.tile(after, len(lengths)))
        lengths = lengths + len(after)
    if before:
        starts = np.cumsum(lengths) - lengths
        ids = np.insert(ids, np.repeat(starts, len(before)), np.tile(before, len(lengths)))
        lengths = lengths + len(before)
    return ids, lengths


def _flatten(encoded: list[list[int]]) -> tuple[Ids, Ids]:
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    return ids, lengths
