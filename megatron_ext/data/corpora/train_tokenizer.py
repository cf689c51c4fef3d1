"""Trains a tokenizer on documents: byte-level BPE (library `tokenizers`) or SentencePiece (unigram or BPE)."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ext.data.files.optional_packages import import_optional
from megatron_ext.data.indexed.manifest import write_atomically
from megatron_ext.data.tokenizers.bpe import END_OF_TEXT

_MAX_SENTENCE_BYTES = 16_000


def train_byte_level_bpe(
    texts: Iterator[str], output_dir: str, vocab_size: int, special_tokens: Sequence[str], min_frequency: int
) -> int:
    """Trains a byte-level BPE like GPT-2's and writes vocab.json, merges.txt, tokenizer.json and tokenizer_config.json.

    Args:
        texts: documents.
        output_dir: directory of these files, created if missing; existing files are replaced by rename.
        vocab_size: number of ids, the 256 bytes and the special tokens included; a short text may yield fewer.
        special_tokens: tokens that get the first ids, in order; must include `<|endoftext|>`, which ends a document.
        min_frequency: pairs of tokens that occur less often are not merged.

    Returns:
        The vocabulary's size.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"--vocab-size {vocab_size}: must be at least {least}, the number of bytes and special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    content = json.loads(backend.to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in content["merges"])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
    }
    files = {
        "vocab.json": json.dumps(backend.get_vocab(), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + merges,
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "tokenizer.json": backend.to_str(pretty=True),
    }
    # The files belong together, so all are written before the first is renamed.
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(write_atomically(Path(output_dir, name))) for name in files]
        for temporary, text in zip(temporaries, files.values(), strict=True):
            temporary.write_text(text, encoding="utf-8")
    size: int = backend.get_vocab_size()
    return size


def train_sentencepiece(
    texts: Iterator[str],
    output_dir: str,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"],
    special_tokens: Sequence[str],
) -> int:
    """Trains a SentencePiece model and writes tokenizer.model.

    Decoding gives back the text exactly: there is no normalisation, white space is kept, and unknown characters become
    bytes. `</s>` ends a document.

    Args:
        texts: documents; the library trains on their lines.
        output_dir: directory of tokenizer.model, created if missing.
        vocab_size: number of pieces, the 256 bytes and the control pieces included.
        model_type: which of the library's algorithms to use.
        special_tokens: pieces to add to `<unk>`, `<s>` and `</s>`.

    Returns:
        The vocabulary's size.

    Raises:
        ValueError: SentencePiece cannot train the model, for example if the text is too short for the vocabulary.
    """
    sentencepiece = import_optional("sentencepiece", "--tokenizer-type SentencePieceTokenizer")
    with write_atomically(Path(output_dir, "tokenizer.model")) as temporary, open(temporary, "wb") as model:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                user_defined_symbols=[
                    token for token in special_tokens if token not in ("<unk>", "<s>", "</s>")
                ],
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=_MAX_SENTENCE_BYTES,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1]
            if largest := re.search(r"too high .* <= (\d+)", reason):
                raise ValueError(
                    f"--vocab-size {vocab_size}: must be at most {largest[1]}, the number of pieces in this text"
                ) from None
            raise ValueError(
                f"--vocab-size {vocab_size}: SentencePiece cannot train the model ({reason})"
            ) from None
    processor = sentencepiece.SentencePieceProcessor(model_file=str(Path(output_dir, "tokenizer.model")))
    size: int = processor.get_piece_size()
    return size


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Yields the lines of documents; cuts long lines, since the library drops lines beyond its limit."""
    step = _MAX_SENTENCE_BYTES // 4
    for text in texts:
        for line in text.split("\n"):
            yield from (line[start : start + step] for start in range(0, len(line), step))
