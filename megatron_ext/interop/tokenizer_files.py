"""Tokenizer files of a Hugging Face directory, to and from a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.config.tokenizer import TokenizerConfig
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer

TOKENIZER_JSON = "tokenizer.json"
_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
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
    """Writes a tokenizer as transformers reads it.

    Args:
        config: where its files are.
        tokenizer: built from `config`.
        target: the directory.

    Returns:
        The names of the files; none for a tokenizer that transformers does not have.
    """
    path = Path(config.tokenizer_model or "")
    if (
        config.tokenizer_type == "HuggingFaceTokenizer"
        and path.is_dir()
        and (path / TOKENIZER_JSON).is_file()
    ):
        names = copy_files(path, target)
    elif config.tokenizer_type in ("GPT2BPETokenizer", "HuggingFaceTokenizer"):
        from megatron_ext.data.tokenizers.bpe import LibraryTokenizer

        assert isinstance(tokenizer, LibraryTokenizer)
        (target / TOKENIZER_JSON).write_text(tokenizer.gigatoken_source(), encoding="utf-8")
        names = [TOKENIZER_JSON]
    elif config.tokenizer_type in ("Llama2Tokenizer", "SentencePieceTokenizer"):
        shutil.copyfile(path, target / "tokenizer.model")
        return ["tokenizer.model"]
    else:
        return []
    if "tokenizer_config.json" not in names:
        text = json.dumps(_tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        names.append("tokenizer_config.json")
    return names


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.inv_vocab[tokenizer.eod],
        "clean_up_tokenization_spaces": False,
    }
