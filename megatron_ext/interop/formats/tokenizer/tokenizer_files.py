"""Reads, copies and writes the tokenizer files of a Hugging Face directory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import processors

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.data.tokenizers.bpe import LibraryTokenizer
from megatron_ext.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_ext.interop.formats.directory_diagnosis import check_no_pointer
from megatron_ext.interop.formats.hf_files import read_object
from megatron_ext.interop.formats.tokenizer.tokenizer_conversion import to_library

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that may belong to a tokenizer in a Hugging Face directory."""

_NOT_READ = (
    "tekken.json",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "tokenizer.model.*",
)
"""Patterns of tokenizer files that cannot be read; a message for the user names such files."""


def copy_files(source: Path, target: Path) -> list[str]:
    """Copies the files listed in `FILES` that exist in `source`, and returns their names.

    Args:
        source: a Hugging Face directory, or a directory written by this function.
        target: output directory; created only if there is a file to copy.
    """
    names = [name for name in FILES if (source / name).is_file()]
    if names:
        target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def imported_tokenizer(
    model_dir: str | Path, vocab_size: int
) -> tuple[TokenizerConfig, Tokenizer, str | None]:
    """Reads the tokenizer of a Hugging Face directory, for a model with `vocab_size` embeddings.

    The tokenizer is read from tokenizer.json, from tokenizer.model (SentencePiece), or from vocab.json and merges.txt,
    which transformers converts. Without any of these the result is a `NullTokenizer`, which reads and prints ids.

    Returns:
        Configuration of the tokenizer, the tokenizer, and a message for the user or None.

    Raises:
        ValueError: the files cannot be read.
    """
    folder = Path(model_dir)
    for name in FILES:
        if (folder / name).is_file():
            check_no_pointer(folder / name)
    config, message = _configuration(folder, vocab_size)
    try:
        tokenizer = build_tokenizer(config)
    except ValueError as error:
        raise ValueError(str(error).replace("--tokenizer-model", "--model-dir")) from None
    if config.tokenizer_type == "NullTokenizer":
        return config, tokenizer, message
    if config.tokenizer_type == "SentencePieceTokenizer":
        message = _lacking_tokens(folder, tokenizer.vocab_size)
    if tokenizer.vocab_size > vocab_size:
        message = (
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model has only {vocab_size} embeddings; "
            "the embeddings of the remaining ids are zero"
        )
    elif tokenizer.vocab_size < vocab_size:
        # Models often have more embeddings than their tokenizer has ids; keep all rows of the checkpoint.
        config = replace(config, vocab_size=vocab_size)
        tokenizer = build_tokenizer(config)
    return config, tokenizer, message


def _configuration(folder: Path, vocab_size: int) -> tuple[TokenizerConfig, str | None]:
    has = {name for name in FILES if (folder / name).is_file()}
    if TOKENIZER_JSON in has or (SENTENCEPIECE not in has and {"vocab.json", "merges.txt"} <= has):
        return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)), None
    if SENTENCEPIECE in has:
        path = str(folder / SENTENCEPIECE)
        return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path), None
    others = [path.name for pattern in _NOT_READ for path in sorted(folder.glob(pattern))]
    what = f" ({', '.join(others)} cannot be read)" if others else ""
    message = f"there is no {TOKENIZER_JSON}{what}, so the checkpoint takes token ids, not text"
    # NullTokenizer adds an end-of-document id to the ids of the flag.
    return TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size - 1), message


def _lacking_tokens(folder: Path, pieces: int) -> str | None:
    """Returns a message about tokens that transformers has added and the SentencePiece file lacks; None if there are
    none.
    """
    named: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        content = read_object(folder / name, "") if (folder / name).is_file() else {}
        decoder = content.get("added_tokens_decoder", {})
        named |= {token: i for token, i in content.items() if name == "added_tokens.json"}
        named |= {str(token.get("content")): int(i) for i, token in decoder.items()}
    added = sorted((i, token) for token, i in named.items() if i >= pieces)
    if not added:
        return None
    return (
        f"{len(added)} added tokens ({', '.join(token for _, token in added[:3])}, ...) are not in {SENTENCEPIECE}, "
        f"so no text is encoded to them; to keep them, save a {TOKENIZER_JSON} with transformers"
    )


def copy_imported(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """Copies the files of an imported tokenizer, and writes a tokenizer.json if transformers had to convert them.

    Args:
        tokenizer: result of `imported_tokenizer` for `source`.
        source: the Hugging Face directory.
        target: output directory.
    """
    copy_files(source, target)
    if isinstance(tokenizer, LibraryTokenizer) and not (target / TOKENIZER_JSON).is_file():
        (target / TOKENIZER_JSON).write_text(tokenizer.backend.to_str(), encoding="utf-8")


def write_files(config: TokenizerConfig, tokenizer: Tokenizer, target: Path) -> list[str]:
    """Writes a tokenizer in the format of transformers; `tokenizer_readback` checks the result.

    Args:
        config: configuration of the tokenizer, with the paths of its files.
        tokenizer: the tokenizer built from `config`.
        target: output directory.

    Returns:
        The names of the written files; empty if transformers does not have this kind of tokenizer.

    Raises:
        ValueError: tokenizer.json cannot express this kind of SentencePiece model.
    """
    path = Path(config.tokenizer_model or "")
    names = []
    if (
        config.tokenizer_type == "HuggingFaceTokenizer"
        and not config.tokenizer_special_tokens
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
        if isinstance(tokenizer, SentencePieceTokenizer):  # tools other than transformers read this file
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
