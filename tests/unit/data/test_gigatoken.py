"""The encoder that preprocessing chooses gives the ids of `tokenizers`, whatever a tokenizer.json asks for."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.preprocess.encoding import choose_encoder
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
MARKS = ["a", "é", "e\u0301", "\u212b", "<a>", "<a>b", "[b]", "_", "1", ".", " the", "self"]
SPACES = [
    " ",
    "\t",
    "\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u200b",
    "\u2028",
    "\u3000",
    "\ufeff",
]

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator([SOURCE], trainer)
    found: dict[str, Any] = json.loads(library.to_str())
    return found


def _with_token(text: str, normalizer: str | None = None, **flags: bool) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        number = len(content["model"]["vocab"])
        content["added_tokens"].append({"id": number, "content": text, **plain, **flags})
        content["normalizer"] = None if normalizer is None else {"type": normalizer}

    return edit


def _model(**settings: object) -> Edit:
    return lambda content: content["model"].update(settings)


def _byte_level(**settings: object) -> Edit:
    return lambda content: content["pre_tokenizer"].update(settings)


LEFT_OUT: dict[str, Edit] = {
    "single_word": _with_token("<a>", single_word=True),
    "single_word of a special token": _with_token("<a>", single_word=True, special=True),
    "rstrip": _with_token(" the", rstrip=True),
    "lstrip": _with_token("<a>", lstrip=True),
    "normalized": _with_token("\u212b", "NFC", normalized=True),
    "end_of_word_suffix": _model(end_of_word_suffix="</w>"),
    "use_regex": _byte_level(use_regex=False),
}
IMPLEMENTED: dict[str, Edit] = {
    "as trained": lambda content: None,
    "a plain added token": _with_token("<a>"),
    "one under a normalizer": _with_token("<a>", "NFC", special=True),
    "normalized without a normalizer": _with_token("<a>", normalized=True),
    "ignore_merges": _model(ignore_merges=True),
}


def _built(content: dict[str, Any], edit: Edit, folder: Path) -> Tokenizer:
    copy = json.loads(json.dumps(content))
    edit(copy)
    (folder / "tokenizer.json").write_text(json.dumps(copy), encoding="utf-8")
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json"))
    )


def _texts() -> list[str]:
    draw = random.Random(0)
    pieces = MARKS + SPACES
    mixed = ["".join(draw.choice(pieces) for _ in range(draw.randint(1, 12))) for _ in range(2000)]
    return mixed + [SOURCE[start : start + 200] for start in range(0, len(SOURCE), 5000)]


@pytest.mark.parametrize("edit", [*LEFT_OUT.values(), *IMPLEMENTED.values()], ids=[*LEFT_OUT, *IMPLEMENTED])
def test_the_chosen_encoder_gives_the_ids_of_tokenizers(
    content: dict[str, Any], edit: Edit, tmp_path: Path
) -> None:
    ours = _built(content, edit, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoder, _ = choose_encoder(ours, "auto", ["a sample without any of it"])
    for text in _texts():
        ((ids, _),) = encoder.encode([text])
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_gigatoken_ignores_is_named_and_the_reference_runs(
    content: dict[str, Any], name: str, tmp_path: Path
) -> None:
    ours = _built(content, LEFT_OUT[name], tmp_path)
    _, choice = choose_encoder(ours, "auto", [])
    assert choice.encoder == "reference"
    assert f"gigatoken does not implement {name.split()[0]}" in choice.reason or name == "use_regex"
    with pytest.raises(ValueError, match="--encoder gigatoken: gigatoken does not implement"):
        choose_encoder(ours, "gigatoken", [])


@pytest.mark.parametrize("name", IMPLEMENTED)
def test_gigatoken_runs_where_nothing_is_left_out(content: dict[str, Any], name: str, tmp_path: Path) -> None:
    _, choice = choose_encoder(_built(content, IMPLEMENTED[name], tmp_path), "auto", [])
    assert choice.encoder == "gigatoken", choice.reason


def test_dropout_is_left_to_the_reference(content: dict[str, Any], tmp_path: Path) -> None:
    _, choice = choose_encoder(_built(content, _model(dropout=0.5), tmp_path), "auto", [])
    assert (choice.encoder, "dropout 0.5" in choice.reason) == ("reference", True)


def test_a_token_that_counts_elsewhere_in_a_text_makes_another_fingerprint(
    content: dict[str, Any], tmp_path: Path
) -> None:
    flags: list[dict[str, Any]] = [{}, {"single_word": True}, {"lstrip": True}, {"rstrip": True}]
    found = {_built(content, _with_token("<a>", **flag), tmp_path).fingerprint() for flag in flags}
    assert len(found) == len(flags)
