"""Finds settings of a tokenizer.json that `gigatoken`, a fast tokenizer library, ignores.

If a file has a setting that gigatoken does not implement, gigatoken in most cases refuses to load the file. But a
comparison with the library `tokenizers` showed that gigatoken 0.10.0 ignores the settings below. They change the ids of
rare texts only, which a comparison on sampled text could miss, so this module looks for the settings in the file
itself.
"""

import json
from collections.abc import Iterator
from typing import Any

from megatron_ext.data.tokenizers.tokenizer import Tokenizer

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip")
_MODEL_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def load(tokenizer: Tokenizer) -> Any:
    """Loads a tokenizer into gigatoken; returns None if the tokenizer has no tokenizer.json for it.

    Raises:
        ModuleNotFoundError: gigatoken is not installed.
        Exception: gigatoken cannot load this tokenizer; it raises exceptions of several kinds.
    """
    import gigatoken

    source = tokenizer.gigatoken_source()
    return None if source is None else gigatoken.Tokenizer.from_json(source)


def left_out(tokenizer_json: str | bytes) -> str | None:
    """Describes the first setting of a tokenizer.json that gigatoken would ignore; None if there is none."""
    content = json.loads(tokenizer_json)
    for name in _MODEL_SETTINGS:
        if content["model"].get(name):
            return f"{name} {content['model'][name]!r}"
    return _in_added_tokens(content) or _in_pre_tokenizer(content.get("pre_tokenizer"))


def added_token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yields texts in which every added token is next to letters, white space, punctuation and itself."""
    source = tokenizer.gigatoken_source()
    for token in json.loads(source).get("added_tokens", ()) if source is not None else ():
        name = token["content"]
        yield f"a{name}b {name}  {name}\n{name}\t1{name}{name}_{name}.{name.lower()}{name.upper()}"


def _in_added_tokens(content: dict[str, Any]) -> str | None:
    for token in content.get("added_tokens") or ():
        flags = [name for name in _TOKEN_FLAGS if token.get(name)]
        if token.get("normalized") and content.get("normalizer") is not None:
            flags.append("normalized")
        if flags:
            return f"{flags[0]} of the added token {token['content']!r}"
    return None


def _in_pre_tokenizer(content: dict[str, Any] | None) -> str | None:
    parts = _parts(content)
    splits = [part for part in parts if part["type"] == "Split"]
    for part in splits:
        if part.get("invert") or part.get("behavior") != "Isolated":
            return f"the splitting {part.get('behavior')}{', inverted' if part.get('invert') else ''}"
    for part in parts:
        # The byte-level step splits by GPT-2's pattern if it is the only step; after a pattern in the file it must
        # not split.
        if part["type"] == "ByteLevel" and part.get("use_regex", True) == bool(splits):
            return f"ByteLevel with use_regex {part.get('use_regex', True)} {'behind' if splits else 'without'} Split"
    return None


def _parts(content: dict[str, Any] | None) -> list[dict[str, Any]]:
    if content is None:
        return []
    if content["type"] == "Sequence":
        return [part for inner in content["pretokenizers"] for part in _parts(inner)]
    return [content]
