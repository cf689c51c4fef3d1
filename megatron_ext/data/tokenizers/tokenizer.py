"""The interface of all tokenizers, for the tools and for mcore's datasets.

The names are mcore's own (`tokenize`, `detokenize`, `vocab`, `inv_vocab`, `vocab_size`, `eod`,
`unique_identifiers`), so an instance can be handed to `GPTDatasetConfig(tokenizer=...)`. mcore's classes are
not the base: importing them loads torch (seconds in every worker process) and they encode one text at a time.
The tests compare the ids with theirs.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property

PROBE_TEXTS = (
    "The quick brown fox didn't jump over 13 lazy dogs; it's 3.14159 o'clock, isn't it?",
    "def f(x: int) -> str:\n    return {'a': [x ** 2, 0xFF]}  # comment\n\n\tclass A:\r\n        pass\n",
    "  leading and trailing spaces \t\t tabs \n\n\n newlines    ",
    "Größe naïve café Ωμέγα Привет мир 漢字かな 한국어 عربي עברית e\u0301 \u00a0\u200b\ufeff 🙂👩‍👩‍👧 𝔘𝔫𝔦",
    "UPPER lower MiXeD snake_case camelCase http://example.org/?q=1&r=2 a@b.c <b>&amp;</b> $#@!%^*()[]{}|\\/~`",
    "<|endoftext|>between<|endoftext|> </s><s> <unk> <pad> [MASK] <|im_end|>",
)
"""Texts whose ids show how a tokenizer behaves (merges, splitting, normalisation, special tokens in text)."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included; every id is below it.
        eod: id of the end-of-document token.
        bos: id of the begin-of-text token that the tokenizer's own files name; None if they name none.
        adds_bos: the tokenizer's own configuration puts `bos` before a text. `tokenize` never does; its callers decide
            (`--prepend-bos` in preprocessing, generation, evaluation).
        reads_special_tokens: whether a special token that a text spells out becomes its id; if not, its letters are
            tokenized.
        reserved_ids: number of ids at the end of `vocab_size` that no text produces; see `reserve`.
        files: the files it was read from, for messages.
    """

    vocab_size: int
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    reads_special_tokens: bool = True
    reserved_ids: int = 0
    files: tuple[str, ...] = ()

    def reserve(self, vocab_size: int) -> None:
        """Raises `vocab_size` to a minimum: a pretrained model may have more embeddings than its tokenizer has tokens.

        The fingerprint and the ids of texts do not change.
        """
        self.reserved_ids = max(0, vocab_size - self.vocab_size)
        self.vocab_size += self.reserved_ids

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text. No token is added; for spelled-out special tokens see `reads_special_tokens`."""

    @abstractmethod
    def detokenize(self, ids: list[int]) -> str:
        """Returns the text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""

    @cached_property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Token -> id; tokens are spelled as in the vocabulary (byte-level BPE: in GPT-2's byte alphabet)."""

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token, the inverse of `vocab`."""
        return {token_id: token for token, token_id in self.vocab.items()}

    def begin(self, ids: list[int]) -> list[int]:
        """Returns ids that begin a text: with `bos` before them if `adds_bos`, unless they have it already."""
        if not self.adds_bos or self.bos is None or ids[:1] == [self.bos]:
            return list(ids)
        return [self.bos, *ids]

    def begin_as(self, documents: list[int] | None) -> None:
        """Makes `begin` add what a model's training documents begin with: a token or none; None if unknown."""
        if documents is not None:
            self.adds_bos = bool(documents)
            self.bos = documents[0] if documents else self.bos

    def choose_bos(self, adds_bos: bool | None) -> None:
        """Sets `adds_bos`; None keeps the setting of the tokenizer's own files.

        Raises:
            ValueError: True was given, but the tokenizer has no begin-of-text token.
        """
        if adds_bos and self.bos is None:
            raise ValueError("--bos: the tokenizer's files name no begin-of-text token (bos_token)")
        self.adds_bos = self.adds_bos if adds_bos is None else adds_bos

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text; equal to `tokenize` on each."""
        return [self.tokenize(text) for text in texts]

    def gigatoken_source(self) -> str | bytes | None:
        """Returns the tokenizer.json from which `gigatoken` can load this tokenizer; None if there is none."""
        return None

    @cached_property
    def _fingerprint(self) -> str:
        probes = list(PROBE_TEXTS) if self._takes_any_text else ["0 1"]
        ids = [self.tokenize(text) for text in probes]
        content = [
            sorted(self.vocab.items(), key=lambda item: (item[1], item[0])),
            self.eod,
            self.vocab_size - self.reserved_ids,
            ids,
            *self._further_probes(),
        ]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    _takes_any_text = True

    def _further_probes(self) -> list[object]:
        """What distinguishes this tokenizer from others beside the vocabulary and the ids of `PROBE_TEXTS`."""
        return []

    def fingerprint(self) -> str:
        """Returns a SHA-256 (hex) of the vocabulary, the eod id and the ids of `PROBE_TEXTS`.

        It depends on what the tokenizer does, not on its file's path, format or type, so the same vocabulary as
        vocab.json + merges.txt and as tokenizer.json has one fingerprint.
        """
        return self._fingerprint

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """What mcore hashes, among other things, to name a cached sample index."""
        return OrderedDict({"class": type(self).__name__, "fingerprint": self.fingerprint()})

    def describe(self) -> dict[str, object]:
        """Returns what a dataset's manifest records about its tokenizer."""
        return {
            "class": type(self).__name__,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "fingerprint": self.fingerprint(),
        }


def in_words(description: Mapping[str, object]) -> str:
    """Describes a tokenizer for a message: class, size, files and the beginning of its fingerprint, as far as known.

    Args:
        description: the result of `Tokenizer.describe`, perhaps with `files`.
    """
    size, fingerprint = description.get("vocab_size"), str(description.get("fingerprint"))
    files = description.get("files")
    parts = [str(description.get("class") or "")]
    parts += [f"{size:,} ids"] if isinstance(size, int) else []
    parts += [" + ".join(map(str, files))] if isinstance(files, list | tuple) and files else []
    known = ", ".join(part for part in parts if part)
    return f"{known}, fingerprint {fingerprint[:8]}" if known else fingerprint
