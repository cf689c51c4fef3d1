"""Tokenizers against mcore's classes and the libraries themselves; gigatoken against both."""

import ctypes
import gc
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers.text import libraries as mcore

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.preprocess.encoding import Encoder, choose_encoder
from megatron_ext.data.tokenizers import build_tokenizer
from tests.unit.data.tokenizer_files import (
    TEXTS,
    bpe_dir,
    sentencepiece_models,
    tiktoken_file,
    training_texts,
)

__all__ = ["bpe_dir", "sentencepiece_models", "tiktoken_file"]  # fixtures


def gpt2(directory: Any) -> Any:
    vocab, merges = str(directory / "vocab.json"), str(directory / "merges.txt")
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges)
    )


def test_vocab_and_merges_give_the_ids_of_the_trained_tokenizer(bpe_dir: Any) -> None:
    ours = gpt2(bpe_dir)
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    for text in (*TEXTS, *training_texts()):
        text = text.replace("<|im_end|>", "")  # special in tokenizer.json only; the two files do not say so
        assert ours.tokenize(text) == library.encode(text).ids
        assert ours.detokenize(ours.tokenize(text)) == text
    assert ours.tokenize_batch(list(TEXTS)) == [ours.tokenize(text) for text in TEXTS]
    assert (ours.eod, ours.vocab_size) == (0, 1000)
    assert ours.vocab == library.get_vocab()
    assert ours.inv_vocab[0] == "<|endoftext|>"


def test_local_hugging_face_directory_gives_mcores_ids(bpe_dir: Any) -> None:
    ours = build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(bpe_dir))
    )
    theirs = mcore.HuggingFaceTokenizer(str(bpe_dir), use_fast=True)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.text_to_ids(text)
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    assert ours.inv_vocab == theirs.inv_vocab


def test_truncation_and_padding_in_a_tokenizer_file_are_switched_off(bpe_dir: Any, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "t.json"))
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    text = "a longer text than four tokens, surely"
    assert build_tokenizer(config).tokenize(text) == gpt2(bpe_dir).tokenize(text)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_gives_mcores_ids_and_loses_nothing(sentencepiece_models: Any, kind: Any) -> None:
    path = sentencepiece_models[kind]
    ours = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path))
    theirs = mcore.SentencePieceTokenizer(path)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.text_to_ids(text)
        if "\x00" not in text and "</s>" not in text:
            assert ours.detokenize(ours.tokenize(text)) == text
    assert ours.tokenize_batch(list(TEXTS)) == [ours.tokenize(text) for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eos_id)
    llama = build_tokenizer(TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=path))
    assert llama.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("vocab_size", [None, 1500])
def test_tiktoken_gives_mcores_ids(tiktoken_file: Any, vocab_size: Any) -> None:
    config = TokenizerConfig(
        tokenizer_type="TikTokenizer", tokenizer_model=tiktoken_file, vocab_size=vocab_size
    )
    ours = build_tokenizer(config)
    theirs = mcore.TikTokenTokenizer(tiktoken_file, vocab_size=ours.vocab_size)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.text_to_ids(text)
        assert ours.detokenize(ours.tokenize(text)) == text
    assert ours.eod == theirs.eod
    assert len(ours.vocab) == ours.vocab_size
    with pytest.raises(ValueError, match="--vocab-size 99999: must lie between 1256 and"):
        build_tokenizer(
            TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=tiktoken_file, vocab_size=99999)
        )


def test_bytes_and_numbers_give_mcores_ids() -> None:
    ours = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    for text in TEXTS:
        assert ours.tokenize(text) == mcore.ByteLevelTokenizer().text_to_ids(text)
        assert ours.detokenize(ours.tokenize(text)) == text
    ours = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=50))
    theirs = mcore.NullTokenizer(50)
    if theirs.vocab_size == 50:  # from 0.18 the size contains the end-of-document token
        theirs = mcore.NullTokenizer(51)
    assert ours.tokenize("3 49 0") == theirs.text_to_ids("3 49 0")
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    with pytest.raises(ValueError, match="must lie between 0 and 50"):
        ours.tokenize("51")


def test_fingerprint_follows_what_a_tokenizer_does(bpe_dir: Any, tmp_path: Path) -> None:
    ours = gpt2(bpe_dir)
    assert gpt2(bpe_dir).fingerprint() == ours.fingerprint()
    (tmp_path / "vocab.json").write_text((bpe_dir / "vocab.json").read_text())
    merges = (bpe_dir / "merges.txt").read_text().splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(merges[:300]))
    assert gpt2(tmp_path).fingerprint() != ours.fingerprint()
    assert json.dumps(ours.unique_identifiers) == json.dumps(gpt2(bpe_dir).unique_identifiers)


def test_tokenizers_travel_to_loader_processes(bpe_dir: Any, sentencepiece_models: Any) -> None:
    sp = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=sentencepiece_models["bpe"])
    for ours in (gpt2(bpe_dir), build_tokenizer(sp)):
        copy = pickle.loads(pickle.dumps(ours))
        assert copy.tokenize(TEXTS[0]) == ours.tokenize(TEXTS[0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab_file": "none.json"}, "--vocab-file .*none.json: no such file"),
        ({"vocab_file": "bad.json"}, "--vocab-file .*bad.json: not a JSON vocabulary"),
        ({"vocab_file": "noend.json"}, "the vocabulary has no <|endoftext|>"),
        ({"merge_file": "bad.txt"}, "--merge-file .*bad.txt: line 1 is not a pair"),
    ],
)
def test_wrong_tokenizer_files_are_named(bpe_dir: Any, tmp_path: Path, files: Any, message: Any) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.txt").write_text("one two three\n")
    vocab = json.loads((bpe_dir / "vocab.json").read_text())
    vocab["other"] = vocab.pop("<|endoftext|>")
    (tmp_path / "noend.json").write_text(json.dumps(vocab))
    paths: dict[str, Any] = {
        "vocab_file": str(bpe_dir / "vocab.json"),
        "merge_file": str(bpe_dir / "merges.txt"),
    }
    paths.update({name: str(tmp_path / file) for name, file in files.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("|", r"\|")):
        build_tokenizer(TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **paths))


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"])
def test_a_file_of_another_format_is_one_clear_line(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "model").write_text("not a model")
    with pytest.raises(ValueError, match="--tokenizer-model .*model: ") as caught:
        build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "model")))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="--tokenizer-model .*none: no such file"):
        build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "none")))


def encoded(encoder: Any, texts: Any) -> Any:
    """Every text's ids, from the flat arrays."""
    result = []
    for ids, lengths in encoder.encode(texts):
        assert lengths.sum() == len(ids)
        result += [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    return result


def test_gigatoken_runs_where_its_ids_are_equal(bpe_dir: Any, sentencepiece_models: Any) -> None:
    ours = gpt2(bpe_dir)
    _, choice = choose_encoder(ours, "auto", ["a sample"])
    assert choice.encoder == "gigatoken"
    assert encoded(Encoder(ours, "gigatoken"), list(TEXTS)) == [ours.tokenize(text) for text in TEXTS]
    assert encoded(Encoder(ours, "gigatoken"), []) == []
    assert choose_encoder(ours, "reference", [])[1].encoder == "reference"
    unigram = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=sentencepiece_models["unigram"]
    )
    _, choice = choose_encoder(build_tokenizer(unigram), "auto", ["a sample"])
    assert (choice.encoder, "does not support" in choice.reason) == ("reference", True)
    with pytest.raises(ValueError, match="--encoder gigatoken: "):
        choose_encoder(build_tokenizer(unigram), "gigatoken", [])


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=8))
@settings(max_examples=200, deadline=None)
def test_gigatoken_equals_the_reference_on_any_text(bpe_dir_cached: Any, texts: Any) -> None:
    ours, fast = bpe_dir_cached
    assert encoded(fast, texts) == [ours.tokenize(text) for text in texts]


@pytest.fixture(scope="module")
def bpe_dir_cached(bpe_dir: Any) -> Any:
    ours = gpt2(bpe_dir)
    return ours, Encoder(ours, "gigatoken")


def test_an_encoder_that_differs_on_the_sample_is_not_used(
    bpe_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = gpt2(bpe_dir)
    content = json.loads(ours.gigatoken_source())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    left, right = json.loads(ours.gigatoken_source())["model"]["merges"][-1]
    monkeypatch.setattr(ours, "gigatoken_source", lambda: json.dumps(content))
    sample = ours.detokenize([ours.vocab[left + right]])
    _, choice = choose_encoder(ours, "auto", ["unaffected", sample])
    assert choice.encoder == "reference"
    assert "gigatoken's ids differ" in choice.reason


def test_without_gigatoken_the_reference_runs(bpe_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    _, choice = choose_encoder(gpt2(bpe_dir), "auto", [])
    assert (choice.encoder, "not installed" in choice.reason) == ("reference", True)


def test_gigatokens_cache_is_given_back_and_ids_stay_the_same(
    bpe_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.data.preprocess import encoding

    ours = gpt2(bpe_dir)
    encoder = Encoder(ours, "gigatoken")
    load, loads = encoding.load, []  # type: ignore[attr-defined]

    def counted(tokenizer: Any) -> Any:
        loads.append(tokenizer)
        return load(tokenizer)

    monkeypatch.setattr(encoding, "load", counted)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 50)
    monkeypatch.setattr(encoding, "_CACHE_BYTES", 4 << 20)
    words = [f"{i * 7919 % 1_000_003:x}{i:o}" for i in range(200_000)]
    texts = [" ".join(words[i : i + 1000]) for i in range(0, len(words), 1000)]
    # Memory that earlier tests freed would hold the cache without growing the process, and its growth is what counts.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    assert encoded(encoder, texts) == ours.tokenize_batch(texts)
    assert 1 <= len(loads) < 100


def test_batches_do_not_change_the_ids(bpe_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gpt2(bpe_dir)
    monkeypatch.setattr("megatron_ext.data.preprocess.encoding._BATCH_CHARACTERS", 50)
    texts = [text for text in TEXTS for _ in range(3)]
    assert encoded(Encoder(ours, "reference"), texts) == [ours.tokenize(text) for text in texts]


@pytest.mark.parametrize(
    ("package", "kind"), [("sentencepiece", "SentencePieceTokenizer"), ("tiktoken", "TikTokenizer")]
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Any, kind: Any
) -> None:
    (tmp_path / "model").write_text("")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"--tokenizer-type {kind}: the package {package} is not installed"):
        build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "model")))
