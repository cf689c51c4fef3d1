"""Tokenizer files of a Hugging Face directory, to and from a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import processors

from megatron_ext.config.tokenizer import TokenizerConfig
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_ext.interop.tokenizer_conversion import to_library

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def copy_files(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer files that there are.

    Args:
        source: a Hugging Face directory, or one that this has written.
        target: a directory, made where there is something to copy.

    Returns:
        Their names.
    """
    names = [name for name in _FILES if (source / name).is_file()]
    if names:
        target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def imported_tokenizer(
    model_dir: str | Path, vocab_size: int
) -> tuple[TokenizerConfig, Tokenizer, str | None]:
    """The tokenizer of a Hugging Face directory, for a model with `vocab_size` embeddings.

    Returns:
        Its configuration; the tokenizer; a note for the user, or None. Without a tokenizer.json it is the one whose
        text is ids in decimal.

    Raises:
        ValueError: the tokenizer.json cannot be read.
    """
    if not (Path(model_dir) / TOKENIZER_JSON).is_file():
        null = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size - 1)
        return null, build_tokenizer(null), f"no {TOKENIZER_JSON}: the checkpoint is for token ids, not text"
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model_dir))
    try:
        tokenizer = build_tokenizer(config)
    except ValueError as error:
        raise ValueError(str(error).replace("--tokenizer-model", "--model-dir")) from None
    note = None
    if tokenizer.vocab_size > vocab_size:
        note = f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size} embeddings: the others are zero"
    elif tokenizer.vocab_size < vocab_size:
        config = TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model_dir), vocab_size=vocab_size
        )
        tokenizer = build_tokenizer(config)
    return config, tokenizer, note


def write_files(config: TokenizerConfig, tokenizer: Tokenizer, target: Path) -> list[str]:
    """Writes a tokenizer as transformers reads it; `tokenizer_readback` proves that it does.

    Args:
        config: where its files are.
        tokenizer: built from `config`.
        target: the directory.

    Returns:
        The names of the files; none for a tokenizer that transformers does not have.

    Raises:
        ValueError: a SentencePiece model of a kind that has no tokenizer.json.
    """
    path = Path(config.tokenizer_model or "")
    names = []
    if (
        config.tokenizer_type == "HuggingFaceTokenizer"
        and path.is_dir()
        and (path / TOKENIZER_JSON).is_file()
    ):
        names = copy_files(path, target)
    else:
        library = to_library(tokenizer, f"--tokenizer-model {path}")
        if library is None:
            return []
        if tokenizer.adds_bos and library.post_processor is None:
            library.post_processor = _begin_with_bos(tokenizer)
        text = library.to_str(pretty=True)
        (target / TOKENIZER_JSON).write_text(text, encoding="utf-8")
        names = [TOKENIZER_JSON]
        if isinstance(tokenizer, SentencePieceTokenizer):  # for readers of SentencePiece models
            (target / "tokenizer.model").write_bytes(tokenizer.serialized_model())
            names.append("tokenizer.model")
    if TOKENIZER_CONFIG not in names:
        text = json.dumps(_tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
        (target / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
        names.append(TOKENIZER_CONFIG)
    return names


def _begin_with_bos(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    assert tokenizer.bos is not None
    bos = tokenizer.inv_vocab[tokenizer.bos]
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos)]
    )


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.inv_vocab[tokenizer.eod],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos is not None:
        found["bos_token"] = tokenizer.inv_vocab[tokenizer.bos]
    if not tokenizer.reads_special_tokens:
        found["split_special_tokens"] = True
    return found
