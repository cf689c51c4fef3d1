"""`TikTokenizer`, which reads a byte-pair rank file in mcore's JSON format and encodes with `tiktoken`.

The file is a list of objects `{"rank", "token_bytes" (base64), "token_str"}` in rank order; the first 256 are the
single bytes. Ids follow mcore's layout: the named special tokens, then `<SPECIAL_i>`, then the ranks.
OpenAI's own `.tiktoken` files are not supported: they lack the splitting pattern and the special tokens.
"""

import base64
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_ext.data.files.optional_packages import import_optional
from megatron_ext.data.tokenizers.bpe import require_file
from megatron_ext.data.tokenizers.tokenizer import Tokenizer

DEFAULT_VOCAB_SIZE = 2**17
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
LEGACY_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""mcore's default pattern (`v2`), which splits a text into words (by case), single digits, punctuation and spaces."""
PATTERN_V1 = (
    r"[^\r\n\p{L}\p{N}]?+\p{L}+"
    r"|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""mcore's pattern `v1`: words are not split by case, and only line ends are kept with the punctuation before them."""


class TikTokenizer(Tokenizer):
    """Tokenizer that encodes with `tiktoken` and numbers the ids as mcore does.

    Args:
        tokenizer_model: the JSON rank file.
        vocab_size: number of ids, special tokens included; tokens whose rank does not fit are dropped. None: all ids of
            the file, but at most 131,072.
        pattern: pattern that splits a text into words: "v1" (`PATTERN_V1`) or "v2" (`PATTERN`).
        num_special_tokens: number of special tokens, which have the first ids.
        special_tokens: names of the first special tokens; the others are called `<SPECIAL_i>`. None: mcore's names.
        legacy: whether the name of a special token within a text is encoded as ordinary text; `special_tokens` None
            then gives names to three tokens only.

    Raises:
        FileNotFoundError, ValueError: the file is missing or malformed, has fewer ranks than `vocab_size` needs, or a
            special token is missing.
    """

    def __init__(
        self,
        tokenizer_model: str,
        vocab_size: int | None = None,
        *,
        pattern: Literal["v1", "v2"] = "v2",
        num_special_tokens: int = 1000,
        special_tokens: Sequence[str] | None = None,
        legacy: bool = False,
    ) -> None:
        tiktoken = import_optional("tiktoken", "--tokenizer-type TikTokenizer")
        require_file("--tokenizer-model", tokenizer_model)
        tokens = _read_ranks(tokenizer_model)
        available = len(tokens) + num_special_tokens
        self.vocab_size = vocab_size or min(DEFAULT_VOCAB_SIZE, available)
        if not 256 + num_special_tokens <= self.vocab_size <= available:
            raise ValueError(
                f"--vocab-size {self.vocab_size}: must lie between {256 + num_special_tokens} and {available}, "
                f"the number of ids in {tokenizer_model} with the special tokens"
            )
        required = LEGACY_SPECIAL_TOKENS if legacy else SPECIAL_TOKENS
        names = _named(required if special_tokens is None else special_tokens, required, num_special_tokens)
        self._special = {token: i for i, token in enumerate(names)}
        self._tokens = tokens[: self.vocab_size - num_special_tokens]
        self.eod, self.bos = self._special["</s>"], self._special["<s>"]
        self.reads_special_tokens = not legacy
        self.pattern = PATTERN_V1 if pattern == "v1" else PATTERN
        self._encoding = tiktoken.Encoding(
            name=Path(tokenizer_model).stem,
            pat_str=self.pattern,
            mergeable_ranks=self.mergeable_ranks(),
            special_tokens=self._special,
        )

    def mergeable_ranks(self) -> dict[bytes, int]:
        """Maps the bytes of each token that is not special to its id."""
        return {token: i for i, token in enumerate(self._tokens, len(self._special))}

    def special_tokens(self) -> dict[str, int]:
        """Maps each special token to its id."""
        return dict(self._special)

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        if not self.reads_special_tokens:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special="all")

    def detokenize(self, ids: list[int]) -> str:
        """Returns the text that token ids stand for."""
        return self._encoding.decode(list(map(int, ids)))

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps each token to its id; a token that is not valid UTF-8 is spelled in bytes, as `<0xE6><0xBC>`."""
        spelled = {_spell(token): i for i, token in enumerate(self._tokens, len(self._special))}
        return {**spelled, **self._special}


def _named(names: Sequence[str], required: Sequence[str], count: int) -> list[str]:
    """Returns `count` names of special tokens: the given names, then `<SPECIAL_i>`."""
    missing = [token for token in required if token not in names]
    if missing:
        raise ValueError(f"--tokenizer-special-tokens {' '.join(names)}: must include {' '.join(missing)}")
    if len(names) > count:
        raise ValueError(
            f"--tiktoken-num-special-tokens {count}: must be at least {len(names)}, the number of "
            "named special tokens"
        )
    return [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), count))]


def _read_ranks(path: str) -> list[bytes]:
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        ranks = [entry["rank"] for entry in entries]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f'--tokenizer-model {path}: expected a JSON list of objects with "rank" and "token_bytes"'
        ) from None
    in_order = ranks == list(range(len(ranks))) and len(set(tokens)) == len(tokens)
    if not in_order or tokens[:256] != [bytes([i]) for i in range(256)]:
        raise ValueError(
            f"--tokenizer-model {path}: ranks must count from 0, the first 256 must be the single bytes, and no "
            "token may appear twice"
        )
    return tokens


def _spell(token: bytes) -> str:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in token)
