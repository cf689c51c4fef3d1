"""Reads an exported tokenizer with transformers' `AutoTokenizer` and compares it with the original tokenizer.

It compares:

- the ids of the end-of-text and begin-of-text tokens, and whether an encoded text begins with begin-of-text;
- the ids of sample texts, of texts with special tokens, and of the text of each single id;
- the texts decoded from the ids of the sample texts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_ext.data.tokenizers.tokenizer import PROBE_TEXTS
from megatron_ext.interop.formats.tokenizer.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_JSON

_GENERAL_CLASS = "PreTrainedTokenizerFast"
_FURTHER_TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "x",
    " lead",
    "trail ",
    "a  b   c",
    "line\r\nline\rline\x0b\x0c\x85\u2028",
    "0123456789 3.14 1,000,000 ½ ٣ Ⅷ",
    "cafe\u0301 café \u1112\u1161\u11ab 한 ﬁ Å \u212b ｶﾞ ～ …",
    "\u0000\u0001\ufffd\U0010fffd",
    "<0x41><0x0A> ▁ ▁▁x Ġ Ċ",
    "🙂🙂🏽👩‍👩‍👧 🇩🇪 𝔘 אב ab אב",
)


def check_read_back(
    folder: Path,
    tokenizer: Tokenizer,
    shown: str | Path,
    *,
    as_imported: bool = False,
    has_code: bool = False,
) -> list[str]:
    """Checks that `AutoTokenizer` reads a tokenizer equal to `tokenizer` from a directory.

    For some models, transformers ignores tokenizer.json and rebuilds the tokenizer by rules of the model's class. If
    this changes ids, the class in tokenizer_config.json is replaced with the general class, and the check is
    repeated.

    Args:
        folder: a Hugging Face directory with config.json and the tokenizer's files.
        tokenizer: the tokenizer that was exported.
        shown: name of the directory in error messages.
        as_imported: whether the files were imported with the model and the model has not been trained since. A
            difference was then already present in the imported directory, so it causes a message instead of an error.
        has_code: whether the directory has a Python file with the model's class; transformers then reads the
            tokenizer as for an unknown model.

    Returns:
        Messages for the user.

    Raises:
        ValueError: the tokenizers differ; the message contains a text with different ids.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        return ["transformers is not installed: the exported tokenizer was not read back with it"]
    # Without this configuration, transformers would ask the user whether to run the code.
    options = {"config": transformers.PreTrainedConfig()} if has_code else {}
    difference = _difference(transformers, folder, tokenizer, options)
    messages = []
    if difference is not None:
        before = (folder / TOKENIZER_CONFIG).read_bytes()
        former = _set_class(folder)
        messages = [
            f"tokenizer_class is set to {_GENERAL_CLASS}, because transformers gives other ids with {former} "
            f"({difference})"
        ]
        left = _difference(transformers, folder, tokenizer, options)
        if left is not None and not as_imported:
            raise ValueError(
                f"--model-dir {shown}: transformers reads the tokenizer differently ({left}); "
                "use --no-tokenizer to export without it, or try another --architecture"
            )
        if left is not None:
            (folder / TOKENIZER_CONFIG).write_bytes(before)
            messages = [
                f"transformers reads this tokenizer differently from its {TOKENIZER_JSON} ({difference}), "
                "as it did in the imported directory"
            ]
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.is_unigram:
        messages.append(
            "SentencePiece adds the scores of a unigram model in 32 bits, the tokenizers library in 64: where two "
            "segmentations are equally likely (runs of white space), they may segment a long text differently"
        )
    return messages


def _set_class(folder: Path) -> str | None:
    """Sets `tokenizer_class` in tokenizer_config.json to the general class; returns the former class."""
    path = folder / TOKENIZER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    former: str | None = content.get("tokenizer_class")
    content["tokenizer_class"] = _GENERAL_CLASS
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return former


def _difference(transformers: Any, folder: Path, ours: Tokenizer, options: dict[str, Any]) -> str | None:
    """Describes the first difference between `AutoTokenizer` and the tokenizer `ours`; None if they are equal."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # transformers raises many types; each means that the tokenizer cannot be read
        return str(error).strip().partition("\n")[0] or type(error).__name__
    named = {"eos_token_id": (theirs.eos_token_id, ours.eod), "bos_token_id": (theirs.bos_token_id, ours.bos)}
    for name, (their_id, our_id) in named.items():
        if their_id != our_id and our_id is not None:
            return f"{name} is {their_id} instead of {our_id}"
    before = theirs("")["input_ids"][:1] == [ours.bos]
    if before != ours.adds_bos and ours.bos is not None:
        return f"it puts {'a' if before else 'no'} begin-of-text token before a text"
    texts = list(_texts(ours))
    found_ids = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, found, wanted in zip(texts, found_ids, ours.tokenize_batch(texts), strict=True):
        if found != wanted:
            return f"{text[:40]!r} gives {_around(found, wanted)} instead of {_around(wanted, found)}"
    return _text_difference(theirs, ours)


def _text_difference(theirs: Any, ours: Tokenizer) -> str | None:
    for text in (*PROBE_TEXTS, *_FURTHER_TEXTS):
        ids = ours.tokenize(text)
        found = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        wanted = ours.detokenize(ids)
        if found != wanted:
            return f"the ids of {text[:40]!r} become {found[:40]!r}"
    return None


def _texts(ours: Tokenizer) -> Iterator[str]:
    yield from PROBE_TEXTS
    yield from _FURTHER_TEXTS
    for number in (ours.eod, ours.bos):
        if number is not None:
            token = ours.inv_vocab[number]
            yield f"a{token}b {token} {token}{token}\n{token}"
    yield from (ours.detokenize([number]) for number in sorted(ours.inv_vocab))


def _around(ids: list[int], others: list[int]) -> list[int]:
    """Returns the ids around the first position at which `ids` and `others` differ."""
    place = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
    return ids[max(place - 2, 0) : place + 6]
