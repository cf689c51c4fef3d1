"""What every tokenizer offers to the tools and to mcore's datasets.

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
"""Texts whose ids stand for a tokenizer's behaviour (merges, splitting, normalisation, special tokens in text)."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included; every id is below it.
        eod: id of the end-of-document token.
        bos: id of the begin-of-text token that the tokenizer's own files name, None without one.
        adds_bos: the tokenizer's own configuration puts `bos` before a text. `tokenize` never does: who makes a text's
            beginning decides it (`--prepend-bos` in preprocessing, generation, evaluation).
        reads_special_tokens: a special token that a text spells out becomes its id; else its letters are tokenized.
        reserved_ids: ids at the end of `vocab_size` that no text gives; see `reserve`.
        files: where it was read from, for messages.
    """

    vocab_size: int
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    reads_special_tokens: bool = True
    reserved_ids: int = 0
    files: tuple[str, ...] = ()

    def reserve(self, vocab_size: int) -> None:
        """Makes `vocab_size` at least so large: a pretrained model may have more embeddings than its tokenizer tokens.

        The fingerprint stays, as does everything that a text is turned into.
        """
        self.reserved_ids = max(0, vocab_size - self.vocab_size)
        self.vocab_size += self.reserved_ids

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text. No token is added; see `reads_special_tokens` for one that is spelled out."""

    @abstractmethod
    def detokenize(self, ids: list[int]) -> str:
        """Returns the text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""

    @cached_property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Token as the vocabulary spells it (for byte-level BPE in GPT-2's byte alphabet) -> id."""

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token, the inverse of `vocab`."""
        return {token_id: token for token, token_id in self.vocab.items()}

    def begin(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text's beginning: `bos` before them where `adds_bos` says so, but not a second one."""
        if not self.adds_bos or self.bos is None or ids[:1] == [self.bos]:
            return list(ids)
        return [self.bos, *ids]

    def begin_as(self, documents: list[int] | None) -> None:
        """Begins texts as the documents do that a model was trained on: with a token, or none; None is not known."""
        if documents is not None:
            self.adds_bos = bool(documents)
            self.bos = documents[0] if documents else self.bos

    def choose_bos(self, adds_bos: bool | None) -> None:
        """Sets `adds_bos`; None leaves it as the tokenizer's own files say.

        Raises:
            ValueError: it shall be added, and the tokenizer has none.
        """
        if adds_bos and self.bos is None:
            raise ValueError("--bos: the tokenizer's files name no begin-of-text token (bos_token)")
        self.adds_bos = self.adds_bos if adds_bos is None else adds_bos

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text; equal to `tokenize` on each."""
        return [self.tokenize(text) for text in texts]

    def gigatoken_source(self) -> str | bytes | None:
        """Returns what `gigatoken` can load this tokenizer from (a tokenizer.json), None where it cannot."""
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
        """What else tells this tokenizer from others; empty where the vocabulary and the texts show its behaviour."""
        return []

    def fingerprint(self) -> str:
        """Returns a SHA-256 (hex) of the vocabulary, the eod id and the ids of `PROBE_TEXTS`.

        It depends on what the tokenizer does, not on its file's path, format or type, so the same vocabulary as
        vocab.json + merges.txt and as tokenizer.json has one fingerprint.
        """
        return self._fingerprint

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """What mcore puts into the hash that names a cached sample index."""
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
    """Names a tokenizer in a message by its class, size, files and the beginning of its fingerprint, where known.

    Args:
        description: as `Tokenizer.describe` gives it, perhaps with `files`.
    """
    size, fingerprint = description.get("vocab_size"), str(description.get("fingerprint"))
    files = description.get("files")
    parts = [str(description.get("class") or "")]
    parts += [f"{size:,} ids"] if isinstance(size, int) else []
    parts += [" + ".join(map(str, files))] if isinstance(files, list | tuple) and files else []
    told = ", ".join(part for part in parts if part)
    return f"{told}, fingerprint {fingerprint[:8]}" if told else fingerprint
