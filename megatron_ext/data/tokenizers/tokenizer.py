"""The interface that all tokenizers share, used by the tools and by mcore's datasets.

The names are mcore's own (`tokenize`, `detokenize`, `vocab`, `inv_vocab`, `vocab_size`, `eod`,
`unique_identifiers`), so an instance can be handed to `GPTDatasetConfig(tokenizer=...)`. mcore's classes do
not serve as the base: importing them loads torch (seconds in every worker process), and they encode one text at a
time. Tests compare our ids with those of mcore's classes.
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
    """Turns text into token ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included; every id is below it.
        eod: id of the end-of-document token.
        bos: id of the begin-of-text token that the tokenizer's own files name; None if they name none.
        adds_bos: whether the tokenizer's own configuration puts `bos` before a text. `tokenize` never does; its callers
            decide (`--prepend-bos` in preprocessing, generation, evaluation).
        reads_special_tokens: whether the name of a special token within a text becomes that token's id; if not, the
            name is tokenized like any other text.
        text_frame: ids that preprocessing puts before and after every text, including an empty one; `tokenize` does
            not add them.
        reserved_ids: number of ids at the end of the vocabulary that no text produces; see `reserve`.
        files: the files that the tokenizer was read from, for messages.
        flags: the given flags that change the ids of a text, without those for type and files; for messages.
    """

    vocab_size: int
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    reads_special_tokens: bool = True
    text_frame: tuple[list[int], list[int]] = ([], [])
    reserved_ids: int = 0
    files: tuple[str, ...] = ()
    flags: str = ""

    def reserve(self, vocab_size: int) -> None:
        """Increases `self.vocab_size` to the given size if it is smaller.

        A pretrained model may have more embedding rows than its tokenizer has tokens.
        The fingerprint and the ids of texts do not change.
        """
        self.reserved_ids = max(0, vocab_size - self.vocab_size)
        self.vocab_size += self.reserved_ids

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text, without a begin-of-text token; for special tokens in the text see
        `reads_special_tokens`.
        """

    @abstractmethod
    def detokenize(self, ids: list[int]) -> str:
        """Returns the text that token ids stand for, special tokens included; invalid UTF-8 becomes U+FFFD."""

    @cached_property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Maps each token to its id; byte-level BPE spells tokens in GPT-2's byte alphabet."""

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Maps each id to its token: the inverse of `vocab`."""
        return {token_id: token for token, token_id in self.vocab.items()}

    def begin(self, ids: list[int]) -> list[int]:
        """Returns `ids`, the beginning of a text, preceded by `bos` if `adds_bos` is set and they lack it."""
        if not self.adds_bos or self.bos is None or ids[:1] == [self.bos]:
            return list(ids)
        return [self.bos, *ids]

    def begin_as(self, documents: list[int] | None) -> None:
        """Makes `begin` add or omit `bos` as in the documents that a model was trained on.

        Args:
            documents: `[id]` if documents began with the token `id`, `[]` if none did; None (unknown) has no effect.
        """
        if documents is not None:
            self.adds_bos = bool(documents)
            self.bos = documents[0] if documents else self.bos

    def choose_bos(self, adds_bos: bool | None) -> None:
        """Sets `adds_bos`; None keeps the setting from the tokenizer's own files.

        Raises:
            ValueError: True was given, but the tokenizer has no begin-of-text token.
        """
        if adds_bos and self.bos is None:
            raise ValueError("--bos: the tokenizer's files name no begin-of-text token (bos_token)")
        self.adds_bos = self.adds_bos if adds_bos is None else adds_bos

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, equal to what `tokenize` returns for it."""
        return [self.tokenize(text) for text in texts]

    def gigatoken_source(self) -> str | bytes | None:
        """Returns a tokenizer.json from which the library `gigatoken` can load this tokenizer; None without one."""
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
        """Returns further properties that the fingerprint must cover, as JSON values."""
        return []

    def fingerprint(self) -> str:
        """Returns a SHA-256 (hex) of the vocabulary, the eod id and the ids of `PROBE_TEXTS`.

        It depends on what the tokenizer does, not on its files or type: the same BPE has the same fingerprint whether
        it is stored as vocab.json and merges.txt or as tokenizer.json.
        """
        return self._fingerprint

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """Returns the data about the tokenizer that mcore includes in the hash that names a cached sample index."""
        return OrderedDict({"class": type(self).__name__, "fingerprint": self.fingerprint()})

    def describe(self) -> dict[str, object]:
        """Returns what a dataset's manifest records about its tokenizer."""
        return {
            "class": type(self).__name__,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "fingerprint": self.fingerprint(),
            **({"flags": self.flags} if self.flags else {}),
        }


def in_words(description: Mapping[str, object]) -> str:
    """Describes a tokenizer for a message: class, size, files and start of its fingerprint, as far as known.

    Args:
        description: the result of `Tokenizer.describe`, optionally with the key `files`.
    """
    size, fingerprint = description.get("vocab_size"), str(description.get("fingerprint"))
    files = description.get("files")
    parts = [str(description.get("class") or "")]
    parts += [f"{size:,} ids"] if isinstance(size, int) else []
    parts += [" + ".join(map(str, files))] if isinstance(files, list | tuple) and files else []
    parts.append(str(description.get("flags") or ""))
    known = ", ".join(part for part in parts if part)
    return f"{known}, fingerprint {fingerprint[:8]}" if known else fingerprint
