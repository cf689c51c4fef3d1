"""Tokenizers; `build_tokenizer` builds the one that a `TokenizerConfig` describes.

All types share the interface of `tokenizer.Tokenizer`, which mcore's datasets accept. The library behind a type is
imported only when a tokenizer of that type is built, so that tools start quickly.
"""

from typing import TypeVar

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.tokenizers.tokenizer import Tokenizer

__all__ = ["Tokenizer", "build_tokenizer"]

_Value = TypeVar("_Value", str, int)


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Builds the tokenizer that a configuration describes.

    Raises:
        FileNotFoundError, ValueError: the tokenizer cannot be built; the one-line message names the flag and the file.
    """
    tokenizer = _build(config)
    tokenizer.files = config.files()
    if config.vocab_size is not None and config.tokenizer_type not in ("TikTokenizer", "NullTokenizer"):
        tokenizer.reserve(config.vocab_size)
    return tokenizer


def _build(config: TokenizerConfig) -> Tokenizer:
    kind = config.tokenizer_type
    if kind == "GPT2BPETokenizer":
        from megatron_ext.data.tokenizers.bpe import GPT2BPETokenizer

        return GPT2BPETokenizer(_given(config.vocab_file), _given(config.merge_file))
    if kind == "HuggingFaceTokenizer":
        from megatron_ext.data.tokenizers.bpe import HuggingFaceTokenizer

        return HuggingFaceTokenizer(_given(config.tokenizer_model))
    if kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        from megatron_ext.data.tokenizers import sentencepiece

        if kind == "Llama2Tokenizer":
            return sentencepiece.Llama2Tokenizer(_given(config.tokenizer_model))
        return sentencepiece.SentencePieceTokenizer(_given(config.tokenizer_model))
    if kind == "TikTokenizer":
        from megatron_ext.data.tokenizers.tiktoken import TikTokenizer

        return TikTokenizer(_given(config.tokenizer_model), config.vocab_size)
    from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer, NullTokenizer

    if kind == "ByteLevelTokenizer":
        return ByteLevelTokenizer()
    return NullTokenizer(_given(config.vocab_size))


def _given(value: _Value | None) -> _Value:
    """Returns the value of a flag that must have been given; `TokenizerConfig` has already checked that it was."""
    assert value is not None
    return value
