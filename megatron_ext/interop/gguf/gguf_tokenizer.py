"""Writes the tokenizer of a GGUF model as the files of a Hugging Face directory.

The metadata key `tokenizer.ggml.model` names the kind of tokenizer:

    gpt2    byte-level BPE: tokens and merges; becomes tokenizer.json
    llama   SentencePiece BPE: tokens and scores; becomes tokenizer.model

A byte-level tokenizer cuts text into words before it applies the merges. The key `tokenizer.ggml.pre` names the rule
for cutting; the rules here come from the models' tokenizer.json. An unknown name is refused, because another rule
would give other tokens.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_ext.interop.gguf.gguf_metadata import GGUFMetadata

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")

_WORDS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""Maps each value of `tokenizer.ggml.pre` to the steps that cut a text into words."""

_CONTROL, _USER_DEFINED = 3, 4
"""Token types in GGUF and in SentencePiece: special tokens, and texts that are never cut."""

_SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's pieces."""

_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_gguf_tokenizer(metadata: GGUFMetadata, folder: Path) -> None:
    """Writes the tokenizer's files into a directory; writes nothing if the model has no tokenizer.

    Raises:
        ValueError: this kind of tokenizer is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind == "no_vocab":
        return
    if kind == "gpt2":
        _byte_level(metadata).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(_sentencepiece(metadata))
    else:
        raise ValueError(
            f"--model-dir {metadata.path}: tokenizer.ggml.model {kind}: only gpt2 and llama are read"
        )
    text = json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if "tokenizer.chat_template" in metadata:
        (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def _byte_level(metadata: GGUFMetadata) -> Tokenizer:
    words = metadata.get("tokenizer.ggml.pre", "missing")
    if words not in _WORDS:
        raise ValueError(
            f"--model-dir {metadata.path}: tokenizer.ggml.pre {words}: only {', '.join(_WORDS)} are read; "
            "import the model's Hugging Face directory instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=words == "llama-bpe",
        )
    )
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_WORDS[words])
    tokenizer.decoder = decoders.ByteLevel()
    if _adds_bos(metadata):
        number = metadata.require("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[number]} $A",
            pair=f"{tokens[number]} $A {tokens[number]} $B",
            special_tokens=[(tokens[number], number)],
        )
    types = metadata["tokenizer.ggml.token_type"]
    for number, token in enumerate(tokens):
        if types[number] == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif types[number] == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _sentencepiece(metadata: GGUFMetadata) -> bytes:
    try:
        protobuf: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise ValueError(
            f"--model-dir {metadata.path}: its tokenizer requires the package sentencepiece; "
            'install it with: pip install "megatron-ext[data]"'
        ) from None
    model = protobuf.ModelProto()
    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    tokens = metadata["tokenizer.ggml.tokens"]
    for name in ("bos", "eos", "unknown"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", -1)
        setattr(model.trainer_spec, f"{name[:3]}_id", number)
        if number >= 0:  # SentencePiece looks up a special token by its piece
            setattr(model.trainer_spec, f"{name[:3]}_piece", tokens[number])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    pieces = zip(
        tokens,
        metadata["tokenizer.ggml.scores"],
        metadata["tokenizer.ggml.token_type"],
        strict=True,
    )
    for piece, score, kind in pieces:
        # In texts that are never cut, GGUF stores spaces unchanged, but SentencePiece replaces spaces as in all other
        # pieces.
        spelled = piece.replace(" ", _SPACE) if kind == _USER_DEFINED else piece
        model.pieces.add(piece=spelled, score=score, type=kind)
    return bytes(model.SerializeToString())


def _adds_bos(metadata: GGUFMetadata) -> bool:
    """Returns whether texts begin with the begin-of-text token."""
    # Files of Llama models lack the key, but their texts begin with the token.
    kinds = (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    return bool(metadata.get("tokenizer.ggml.add_bos_token", "llama" in kinds or "llama-bpe" in kinds))


def _tokenizer_config(metadata: GGUFMetadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        name: tokens[metadata[f"tokenizer.ggml.{key}"]]
        for name, key in _NAMES.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    config["clean_up_tokenization_spaces"] = False
    is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    config["tokenizer_class"] = "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast"
    config["add_bos_token"] = _adds_bos(metadata)
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    return config
