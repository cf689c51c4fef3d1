"""The tokenizer of a run; `megatron_ext.data.tokenizers` builds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from megatron_ext.config.command_line.field_checks import (
    Switch,
    check_at_least,
    check_at_most,
    check_choices,
    flag,
    flag_name,
)

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
]

_NEEDS = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}
_TAKES_SPECIAL_TOKENS = ("GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer")


def tokenizer_flags(kind: str) -> str | None:
    """Returns, for a message, the flags that choose the tokenizer with this class name; None if there are none."""
    kind = kind.removeprefix("Legacy")
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

    tokenizer_special_tokens: Annotated[
        tuple[str, ...] | None, flag(aliases=("--tiktoken-special-tokens", "--special-tokens"))
    ] = None
    """Special tokens. Byte-level BPE: added to the vocabulary, if it lacks them. TikTokenizer: the first ids, in this
    order; must include <unk> <s> </s> <mask> <pad> <cls> <sep>.
    """

    tiktoken_pattern: Literal["v1", "v2"] = "v2"
    """Pattern by which TikTokenizer splits a text into words: v2 splits them by case, too."""

    tiktoken_num_special_tokens: int = 1000
    """Number of ids that TikTokenizer reserves for special tokens, before all others."""

    tokenizer_hf_include_special_tokens: bool = False
    """HuggingFaceTokenizer: in preprocessing, add to every text the special tokens that the tokenizer.json specifies,
    for example at its beginning. Megatron-LM adds them by default.
    """

    legacy_tokenizer: Switch = False
    """Encode as Megatron-LM did before its tokenizers moved into megatron-core. GPT2BPETokenizer, TikTokenizer: the
    name of a special token within a text is encoded as ordinary text. SentencePieceTokenizer: such a name becomes the
    token's id, and <EOD> ends a document. Llama2Tokenizer: <s> is put before every text. HuggingFaceTokenizer: the
    same as --tokenizer-hf-include-special-tokens.
    """

    @classmethod
    def missing(cls, given: Mapping[str, Any]) -> list[str]:
        """Returns the required flags that were not given; see `flag_table.missing_flags`."""
        kind = given.get("tokenizer_type", cls.tokenizer_type)
        lacking = [flag_name(name) for name in _NEEDS.get(kind, ()) if name not in given]
        named = [f"{flag} (for --tokenizer-type {kind})" for flag in lacking]
        if named and "vocab_size" not in _NEEDS[kind]:
            named[-1] += " (or --tokenizer-type NullTokenizer --vocab-size N, which needs no files)"
        return named

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "vocab_size", "tiktoken_num_special_tokens")
        check_at_most(self, 2**24, "vocab_size")  # the vocabulary is kept as a list in memory
        for name in _NEEDS.get(self.tokenizer_type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"--tokenizer-type {self.tokenizer_type}: requires {flag_name(name)}")
        if self.tokenizer_special_tokens and self.tokenizer_type not in _TAKES_SPECIAL_TOKENS:
            raise ValueError(
                f"--tokenizer-special-tokens: requires --tokenizer-type {' or '.join(_TAKES_SPECIAL_TOKENS)}"
                f" (got {self.tokenizer_type}, whose special tokens are those of its files)"
            )
        if len(set(self.tokenizer_special_tokens or ())) != len(self.tokenizer_special_tokens or ()):
            raise ValueError(
                f"--tokenizer-special-tokens {' '.join(self.tokenizer_special_tokens or ())}: names a token twice"
            )

    def further_flags(self) -> str:
        """Returns the given flags, other than type and files, that change the ids of a text; "" if all have their
        defaults.
        """
        flags = ["--legacy-tokenizer"] if self.legacy_tokenizer else []
        if self.tokenizer_type == "TikTokenizer":
            for name in ("tiktoken_pattern", "tiktoken_num_special_tokens"):
                if getattr(self, name) != getattr(type(self), name):
                    flags.append(f"{flag_name(name)} {getattr(self, name)}")
        if self.tokenizer_special_tokens:
            flags.append(f"--tokenizer-special-tokens {' '.join(self.tokenizer_special_tokens)}")
        return " ".join(flags)

    def files(self) -> tuple[str, ...]:
        """Returns the paths of the tokenizer's files."""
        return tuple(
            path for path in (self.tokenizer_model, self.vocab_file, self.merge_file) if path is not None
        )
