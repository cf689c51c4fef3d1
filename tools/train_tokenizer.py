"""Train a tokenizer on raw text: byte-level BPE (vocab.json, merges.txt, tokenizer.json) or SentencePiece
(tokenizer.model).

Exit codes: 0 success; 2 an error in flags or input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import check_at_least, check_choices
from megatron_ext.config.command_line.flag_text import argument_text
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.preprocess_config import InputConfig

END_OF_TEXT = "<|endoftext|>"
EXAMPLE = (
    "python tools/train_tokenizer.py --input corpus.jsonl --output-dir data/tokenizer --vocab-size 32768"
)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Flags for the tokenizer to train."""

    output_dir: str
    """Directory to write the tokenizer's files to."""

    vocab_size: int = 32768
    """Number of token ids, including special tokens."""

    tokenizer_type: Literal["GPT2BPETokenizer", "SentencePieceTokenizer"] = "GPT2BPETokenizer"
    """Type of the tokenizer: byte-level BPE (GPT2BPETokenizer) or SentencePiece."""

    model_type: Literal["unigram", "bpe"] = "unigram"
    """With SentencePieceTokenizer: the algorithm, unigram or BPE."""

    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Special tokens of the tokenizer; they get the first ids."""

    min_frequency: int = 2
    """With byte-level BPE: merge only pairs that occur at least this often."""

    max_characters: int | None = None
    """Train on this many characters from the beginning of the input. Default: all."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "vocab_size", "min_frequency", "max_characters")
        if self.tokenizer_type == "GPT2BPETokenizer" and END_OF_TEXT not in self.special_tokens:
            raise ValueError(f"--special-tokens {' '.join(self.special_tokens)}: must include {END_OF_TEXT}")


def documents(inputs: InputConfig, max_characters: int | None) -> Iterator[str]:
    """Yields the text of every key of every document, up to `max_characters` in total.

    Raises:
        ValueError: a line is not a document, or the input has no text.
    """
    from megatron_ext.data.readers import iter_documents

    left, is_empty = max_characters, True
    for texts in iter_documents(inputs):
        for text in texts:
            is_empty = is_empty and not text
            yield text if left is None else text[:left]
            if left is not None:
                left -= len(text)
                if left <= 0:
                    return
    if is_empty:
        raise ValueError(f"--input {' '.join(inputs.input)}: has no text to train a tokenizer on")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerFlags:
    """Flags of this tool."""

    input: InputConfig
    tokenizer: TrainTokenizerConfig


def main() -> None:
    """Trains the tokenizer and prints its size."""
    flags = parse(
        TrainTokenizerFlags,
        prog="tools/train_tokenizer.py",
        description=str(__doc__),
        example=EXAMPLE,
    )
    config = flags.tokenizer
    from megatron_ext.data.corpora.train_tokenizer import train_byte_level_bpe, train_sentencepiece

    special_tokens = tuple(argument_text("--special-tokens", token) for token in config.special_tokens)
    texts = documents(flags.input, config.max_characters)
    if config.tokenizer_type == "GPT2BPETokenizer":
        size = train_byte_level_bpe(
            texts, config.output_dir, config.vocab_size, special_tokens, config.min_frequency
        )
    else:
        size = train_sentencepiece(
            texts, config.output_dir, config.vocab_size, config.model_type, special_tokens
        )
    print(f"{config.output_dir}: {config.tokenizer_type} of {size:,} tokens")
    if size < config.vocab_size:
        reason = "the text has no further pieces"
        if config.tokenizer_type == "GPT2BPETokenizer":
            reason = (
                f"no further pair in the text occurs at least {config.min_frequency} times (--min-frequency)"
            )
        print(f"this is fewer than --vocab-size {config.vocab_size}, because {reason}")


if __name__ == "__main__":
    run_main(main)
