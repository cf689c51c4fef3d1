"""Which tokenizer a run uses; `megatron_ext.data.tokenizers` builds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_choices,
    flag_name,
)

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
]

_NEEDS = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}


def tokenizer_flags(kind: str) -> str | None:
    """Returns the flags that choose a type of tokenizer, for a message; None if there is no such type."""
    if kind not in get_args(TokenizerType):
        return None
    return " ".join(
        [f"--tokenizer-type {kind}", *(f"{flag_name(name)} ..." for name in _NEEDS.get(kind, ()))]
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Flags for the tokenizer and its files."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    """Tokenizer implementation, named as in Megatron-LM."""

    tokenizer_model: str | None = None
    """File or local directory of a Hugging Face, SentencePiece, Llama 2 or tiktoken tokenizer."""

    vocab_file: str | None = None
    """Path of vocab.json, for GPT2BPETokenizer."""

    merge_file: str | None = None
    """Path of merges.txt, for GPT2BPETokenizer."""

    vocab_size: int | None = None
    """Number of token ids: the exact number for NullTokenizer, which requires it; a minimum for other tokenizers."""

    @classmethod
    def missing(cls, given: Mapping[str, Any]) -> list[str]:
        """Returns the required flags that were not given; see `flag_table.missing_flags`."""
        kind = given.get("tokenizer_type", cls.tokenizer_type)
        lacking = [flag_name(name) for name in _NEEDS.get(kind, ()) if name not in given]
        return [f"{flag} (for --tokenizer-type {kind})" for flag in lacking]

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "vocab_size")
        check_at_most(self, 2**24, "vocab_size")  # the vocabulary is kept as a list in memory
        for name in _NEEDS.get(self.tokenizer_type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"--tokenizer-type {self.tokenizer_type}: requires {flag_name(name)}")

    def files(self) -> tuple[str, ...]:
        """Returns the paths of the tokenizer's files."""
        return tuple(
            path for path in (self.tokenizer_model, self.vocab_file, self.merge_file) if path is not None
        )
