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
    tokenizer.files, tokenizer.flags = config.files(), config.further_flags()
    if config.vocab_size is not None and config.tokenizer_type not in ("TikTokenizer", "NullTokenizer"):
        tokenizer.reserve(config.vocab_size)
    return tokenizer


def _build(config: TokenizerConfig) -> Tokenizer:
    kind = config.tokenizer_type
    if kind in ("GPT2BPETokenizer", "HuggingFaceTokenizer"):
        return _build_bpe(config)
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        return _build_sentencepiece(config)
    if kind == "TikTokenizer":
        from megatron_ext.data.tokenizers.tiktoken import TikTokenizer

        return TikTokenizer(
            _given(config.tokenizer_model),
            config.vocab_size,
            pattern=config.tiktoken_pattern,
            num_special_tokens=config.tiktoken_num_special_tokens,
            special_tokens=config.tokenizer_special_tokens,
            legacy=config.legacy_tokenizer,
        )
    from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer, NullTokenizer

    if kind == "ByteLevelTokenizer":
        return ByteLevelTokenizer()
    return NullTokenizer(_given(config.vocab_size))


def _build_bpe(config: TokenizerConfig) -> Tokenizer:
    from megatron_ext.data.tokenizers.bpe import GPT2BPETokenizer, HuggingFaceTokenizer

    special = config.tokenizer_special_tokens or ()
    if config.tokenizer_type == "GPT2BPETokenizer":
        files = _given(config.vocab_file), _given(config.merge_file)
        return GPT2BPETokenizer(*files, special, legacy=config.legacy_tokenizer)
    tokenizer = HuggingFaceTokenizer(_given(config.tokenizer_model), special)
    if config.tokenizer_hf_include_special_tokens or config.legacy_tokenizer:
        tokenizer.frame_texts()
    return tokenizer


def _build_sentencepiece(config: TokenizerConfig) -> Tokenizer:
    from megatron_ext.data.tokenizers import sentencepiece

    model, legacy = _given(config.tokenizer_model), config.legacy_tokenizer
    if config.tokenizer_type == "Llama2Tokenizer":
        return (sentencepiece.LegacyLlama2Tokenizer if legacy else sentencepiece.Llama2Tokenizer)(model)
    if legacy and config.tokenizer_type == "SentencePieceTokenizer":
        return sentencepiece.LegacySentencePieceTokenizer(model)
    return sentencepiece.SentencePieceTokenizer(model)


def _given(value: _Value | None) -> _Value:
    """Returns the value of a flag that must have been given; `TokenizerConfig` has already checked that it was."""
    assert value is not None
    return value
