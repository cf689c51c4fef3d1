"""`SentencePieceTokenizer` and `Llama2Tokenizer`, which read a SentencePiece model file.

Both encode as mcore's class does: they add no token before or after the text. `LegacySentencePieceTokenizer` and
`LegacyLlama2Tokenizer` encode as Megatron-LM did with `--legacy-tokenizer`. Whether a model expects `<s>` before a
text (`adds_bos`) is read from `add_bos_token` in a tokenizer_config.json beside the model file; without such an entry,
only Llama 2's model expects it.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.data.files.optional_packages import import_optional
from megatron_ext.data.tokenizers.bpe import EOD_CANDIDATES, require_file, tokenizer_settings
from megatron_ext.data.tokenizers.tokenizer import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer read from a SentencePiece model file.

    Args:
        tokenizer_model: the .model file; its end-of-sentence piece ends a document.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is not a SentencePiece model, or has no piece that can end a
            document.
    """

    def __init__(self, tokenizer_model: str) -> None:
        require_file("--tokenizer-model", tokenizer_model)
        sentencepiece = import_optional("sentencepiece", "--tokenizer-type SentencePieceTokenizer")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer_model)
        except (RuntimeError, OSError):
            raise ValueError(f"--tokenizer-model {tokenizer_model}: not a SentencePiece model") from None
        self._path = tokenizer_model
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._find_eod()
        bos: int = self._processor.bos_id()
        self.bos = bos if bos >= 0 else None
        adds = tokenizer_settings(Path(tokenizer_model).parent).get("add_bos_token", self._begins_with_bos)
        self.adds_bos = bool(adds) and self.bos is not None

    reads_special_tokens = False
    _begins_with_bos = False

    def _find_eod(self) -> int:
        eos: int = self._processor.eos_id()
        if eos >= 0:
            return eos
        for piece in EOD_CANDIDATES:
            piece_id: int = self._processor.piece_to_id(piece)
            if piece_id != self._processor.unk_id():
                return piece_id
        raise ValueError(
            f"--tokenizer-model {self._path}: the model has no end-of-sentence piece, which is needed "
            "to end a document"
        )

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text; uses the calling thread only."""
        ids: list[list[int]] = self._processor.encode(texts, num_threads=1)
        return ids

    def detokenize(self, ids: list[int]) -> str:
        """Returns the text that token ids stand for; leaves out control pieces such as `</s>`."""
        text: str = self._processor.decode(list(map(int, ids)))
        return text

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps each piece to its id."""
        return {self._processor.id_to_piece(i): i for i in range(self._processor.get_piece_size())}

    @property
    def is_unigram(self) -> bool:
        """True for a unigram model, which compares whole segmentations; False for BPE, which merges pairs."""
        return bool(self.proto().trainer_spec.model_type == 1)

    def proto(self) -> Any:
        """Returns the model's pieces and settings, as SentencePiece's own `ModelProto`."""
        from sentencepiece import sentencepiece_model_pb2

        message: Any = sentencepiece_model_pb2
        return message.ModelProto.FromString(self.serialized_model())

    def serialized_model(self) -> bytes:
        """Returns the content of the model file."""
        return Path(self._path).read_bytes()

    def gigatoken_source(self) -> bytes | str | None:
        """Returns the model converted to a tokenizer.json; None if it cannot be converted."""
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        try:
            return sentencepiece_to_tokenizer_json(self.serialized_model())
        except ValueError:
            return None

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        type(self).__init__(self, path)


class Llama2Tokenizer(SentencePieceTokenizer):
    """Llama 2's SentencePiece model, which expects `<s>` before a text unless its configuration says otherwise."""

    _begins_with_bos = True


class LegacyLlama2Tokenizer(Llama2Tokenizer):
    """Llama 2's model as Megatron-LM used it with `--legacy-tokenizer`: every text of a dataset begins with `<s>`."""

    def __init__(self, tokenizer_model: str) -> None:
        super().__init__(tokenizer_model)
        self.text_frame = ([] if self.bos is None else [self.bos], [])


class LegacySentencePieceTokenizer(SentencePieceTokenizer):
    """A SentencePiece model as Megatron-LM used it with `--legacy-tokenizer`.

    It has further special tokens; those that the model lacks get the ids after the model's. `<EOD>` ends a document.
    The name of a special token within a text becomes the token's id.
    """

    reads_special_tokens = True

    def __init__(self, tokenizer_model: str) -> None:
        super().__init__(tokenizer_model)
        self.vocab_size = len(self.vocab)
        self._special = {name: self.vocab[name] for name in self._special_names()}
        self._name_of = {token_id: name for name, token_id in self._special.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._special)))

    def _special_names(self) -> list[str]:
        model = self._processor
        ids = {"<PAD>": model.pad_id(), "<BOS>": model.bos_id(), "<EOS>": model.eos_id()}
        named = [model.id_to_piece(piece) if piece >= 0 else name for name, piece in ids.items()]
        return ["<CLS>", "<SEP>", "<EOD>", "<MASK>", *named]

    def _find_eod(self) -> int:
        return self.vocab["<EOD>"]

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps each piece, and each special token that the model lacks, to its id."""
        vocab = dict(super().vocab)
        for name in self._special_names():
            vocab.setdefault(name, len(vocab))
        return vocab

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text; the texts between special tokens are encoded one by one."""
        ids: list[int] = []
        position = 0
        for found in self._pattern.finditer(text):
            ids += self._processor.encode(text[position : found.start()])
            ids.append(self._special[found.group()])
            position = found.end()
        ids += self._processor.encode(text[position:])
        return ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: list[int]) -> str:
        """Returns the text that token ids stand for, special tokens included."""
        pieces: list[str] = []
        between: list[int] = []
        for token_id in map(int, ids):
            if token_id in self._name_of:
                pieces += [self._processor.decode(between), self._name_of[token_id]]
                between = []
            else:
                between.append(token_id)
        return "".join([*pieces, self._processor.decode(between)])

    def gigatoken_source(self) -> None:
        """Returns None: gigatoken does not know the additional special tokens."""
        return None
