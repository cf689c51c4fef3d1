"""Tokenizers that need no file: `ByteLevelTokenizer` (UTF-8 bytes) and `NullTokenizer` (ids written as numbers).

mcore's byte-level class gives its special tokens the ids 0 and 1 by default, which are also bytes; here the
byte values keep 0..255 and the end-of-document token follows them.
"""

from functools import cached_property

from megatron_ext.data.tokenizers.bpe import END_OF_TEXT
from megatron_ext.data.tokenizers.tokenizer import Tokenizer


class ByteLevelTokenizer(Tokenizer):
    """Tokenizer whose ids 0 to 255 are the bytes of UTF-8 text; id 256 ends a document."""

    vocab_size = 257
    eod = 256
    reads_special_tokens = False

    def tokenize(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of a text, as ids."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: list[int]) -> str:
        """Returns the text whose UTF-8 bytes are the ids; id 256 becomes `<|endoftext|>`."""
        pieces = (END_OF_TEXT.encode() if i == self.eod else bytes([i]) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps `<0x00>` to 0, and so on up to `<0xFF>` to 255, and `<|endoftext|>` to 256."""
        return {**{f"<0x{byte:02X}>": byte for byte in range(256)}, END_OF_TEXT: self.eod}


class NullTokenizer(Tokenizer):
    """Tokenizer for texts that consist of decimal ids separated by white space; for benchmarks and tests.

    Args:
        vocab_size: number of ordinary ids; the next id ends a document, so the tokenizer has `vocab_size + 1` ids.
    """

    _takes_any_text = False

    def __init__(self, vocab_size: int) -> None:
        self.eod = vocab_size
        self.vocab_size = vocab_size + 1

    def tokenize(self, text: str) -> list[int]:
        """Returns the numbers that a text consists of.

        Raises:
            ValueError: a word is not the decimal number of one of the tokenizer's ids.
        """
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                "NullTokenizer: a text must consist of decimal numbers separated by white space"
            ) from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"NullTokenizer: the numbers of a text must lie between 0 and {self.vocab_size - 1} "
                f"(smallest {min(ids)}, largest {max(ids)})"
            )
        return ids

    def detokenize(self, ids: list[int]) -> str:
        """Returns the ids in decimal, separated by spaces."""
        return " ".join(map(str, map(int, ids)))

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps the decimal spelling of each id to the id."""
        return {str(i): i for i in range(self.vocab_size)}
