"""An exported tokenizer, read by transformers' `AutoTokenizer`, gives the ids that the model was trained with."""

import argparse
import base64
import difflib
import io
import json
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.corpora.train_tokenizer import train_byte_level_bpe, train_sentencepiece
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.interop.formats.tokenizer.tokenizer_files import write_files
from megatron_ext.interop.formats.tokenizer.tokenizer_readback import check_read_back

SOURCES = [Path(str(m.__file__)).read_text(encoding="utf-8") for m in (argparse, textwrap, difflib)]
SOURCES.append("Größe naïve café Ωμέγα Привет мир 漢字かな 한국어 🙂 " * 20)
PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "lead",
    "the",
    " self",
    "<|im_end|>",
    "</s>",
    "<s>",
    "<unk>",
    "<|endoftext|>",
]
PIECES += [
    "é",
    "e\u0301",
    "漢字",
    "🙂",
    "Ω",
    "1234",
    "\u00a0",
    "ﬁ",
    "한",
    "\u1112\u1161\u11ab",
    "～",
    "½",
    "\x00",
    "א",
]


def _texts() -> list[str]:
    draw = random.Random(0)
    mixed = ["".join(draw.choice(PIECES) for _ in range(draw.randint(1, 10))) for _ in range(1000)]
    return ["", " ", "  ", "\n", " lead", "lead ", *mixed]


def _byte_level_bpe(folder: Path) -> TokenizerConfig:
    train_byte_level_bpe(iter(SOURCES), str(folder), 900, ("<|endoftext|>", "<|im_end|>"), 2)
    names = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **names)  # type: ignore[arg-type]


def _hugging_face(folder: Path) -> TokenizerConfig:
    """A directory as Llama 3's: byte-level, a pattern of its own, special tokens, a begin-of-text token."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    library.normalizer = normalizers.NFC()
    own = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([own, byte_level])
    library.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        SOURCES, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    library.add_tokens(
        [AddedToken("the", single_word=True, normalized=False), AddedToken("self", lstrip=True)]
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def _own_sentencepiece(kind: Any) -> Callable[[Path], TokenizerConfig]:
    def make(folder: Path) -> TokenizerConfig:
        train_sentencepiece(iter(SOURCES), str(folder), 900, kind, ("<|im_end|>",))
        return TokenizerConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "tokenizer.model")
        )

    return make


def _sentencepiece(tokenizer_type: Any, **settings: Any) -> Callable[[Path], TokenizerConfig]:
    def make(folder: Path) -> TokenizerConfig:
        model = io.BytesIO()
        lines = (line for text in SOURCES for line in text.split("\n"))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, vocab_size=1100, **settings
        )
        (folder / "x.model").write_bytes(model.getvalue())
        return TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=str(folder / "x.model"))

    return make


def _tiktoken(folder: Path) -> TokenizerConfig:
    _byte_level_bpe(folder)
    letters = bytes_to_unicode()
    to_byte = {letter: byte for byte, letter in letters.items()}
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    learnt = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1]) if len(t) > 1 and "<|" not in t]
    tokens = [bytes([i]) for i in range(256)] + [bytes(to_byte[letter] for letter in t) for t in learnt]
    entries = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    (folder / "ranks.json").write_text(json.dumps(entries), encoding="utf-8")
    return TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(folder / "ranks.json"))


LLAMA = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
}
MADE: dict[str, Callable[[Path], TokenizerConfig]] = {
    "GPT2BPETokenizer": _byte_level_bpe,
    "HuggingFaceTokenizer": _hugging_face,
    "our unigram": _own_sentencepiece("unigram"),
    "our SentencePiece bpe": _own_sentencepiece("bpe"),
    "Llama 2's kind": _sentencepiece("Llama2Tokenizer", model_type="bpe", **LLAMA),
    "bpe without a dummy prefix": _sentencepiece(
        "SentencePieceTokenizer",
        model_type="bpe",
        add_dummy_prefix=False,
        user_defined_symbols=["<|im_end|>", "\n\n"],
        **LLAMA,
    ),
    "bpe, nmt_nfkc, extra white space removed": _sentencepiece(
        "SentencePieceTokenizer", model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc"
    ),
    "unigram with unknown letters": _sentencepiece("SentencePieceTokenizer", model_type="unigram"),
    "TikTokenizer": _tiktoken,
    "ByteLevelTokenizer": lambda folder: TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
    "added special tokens": lambda folder: replace(
        _hugging_face(folder), tokenizer_special_tokens=("<|im_end|>", "漢字", "<new>")
    ),
    "legacy GPT2BPETokenizer": lambda folder: replace(_byte_level_bpe(folder), legacy_tokenizer=True),
    "legacy TikTokenizer, v1": lambda folder: replace(
        _tiktoken(folder), legacy_tokenizer=True, tiktoken_pattern="v1", tiktoken_num_special_tokens=5
    ),
}


def _exported(config: TokenizerConfig, folder: Path, model_type: str = "llama") -> list[str]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    tokenizer = build_tokenizer(config)
    assert write_files(config, tokenizer, folder)
    return check_read_back(folder, tokenizer, folder)


@pytest.mark.parametrize("name", MADE)
def test_transformers_gives_the_ids_and_the_text_of_an_exported_tokenizer(name: str, tmp_path: Path) -> None:
    config = MADE[name](tmp_path)
    ours = build_tokenizer(config)
    notes = _exported(config, tmp_path / "out")
    assert len(notes) == ("unigram" in name), notes
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in _texts():
        ids = ours.tokenize(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == [ours.bos] * ours.adds_bos + ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.detokenize(ids)
    assert theirs.eos_token_id == ours.eod
    assert len(theirs) <= ours.vocab_size


@pytest.mark.parametrize("name", ["our unigram", "our SentencePiece bpe", "Llama 2's kind"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_sentencepiece_is_read_right_beside_a_model_of_another_family(
    name: str, model_type: str, tmp_path: Path
) -> None:
    config = MADE[name](tmp_path)
    _exported(config, tmp_path / "out", model_type)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in _texts()[:200]:
        assert theirs(text, add_special_tokens=False).input_ids == build_tokenizer(config).tokenize(text)


def test_an_exported_sentencepiece_is_read_by_us_as_the_same_tokenizer(tmp_path: Path) -> None:
    config = MADE["our SentencePiece bpe"](tmp_path)
    _exported(config, tmp_path / "out")
    again = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "out"))
    assert build_tokenizer(again).fingerprint() == build_tokenizer(config).fingerprint()


def test_a_unigram_model_segments_long_texts_differently_only_where_it_is_as_likely(tmp_path: Path) -> None:
    config = MADE["our unigram"](tmp_path)
    (note,) = _exported(config, tmp_path / "out")
    assert "segment a long text differently" in note
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), build_tokenizer(config)
    pieces = sentencepiece.SentencePieceProcessor(model_file=config.tokenizer_model)
    for text in SOURCES:
        found, wanted = theirs(text, add_special_tokens=False).input_ids, ours.tokenize(text)
        assert theirs.decode(found) == theirs.decode(wanted)
        differing = sum((Counter(found) - Counter(wanted)).values())
        assert differing < len(wanted) / 1000
        # Both sum fp32 scores over thousands of pieces, so ties are decided by rounding.
        score_of = pieces.get_score
        assert sum(map(score_of, found)) == pytest.approx(sum(map(score_of, wanted)), rel=1e-6)


def test_a_tokenizer_that_transformers_reads_differently_is_refused(tmp_path: Path) -> None:
    # Qwen2's class is always built anew by transformers 5, with Qwen's own pattern.
    config = MADE["our SentencePiece bpe"](tmp_path)
    with pytest.raises(
        ValueError, match="--model-dir .*out: transformers reads .*; use --no-tokenizer to export without it"
    ):
        _exported(config, tmp_path / "out", "qwen2")


def test_a_class_that_makes_other_ids_is_replaced_and_told(tmp_path: Path) -> None:
    config = MADE["HuggingFaceTokenizer"](tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    assert "GPT2Tokenizer" in "".join(_exported(config, tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in _texts()[:200]:
        assert theirs(text, add_special_tokens=False).input_ids == build_tokenizer(config).tokenize(text)
