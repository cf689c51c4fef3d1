"""tools/train_tokenizer.py as a user runs it."""

import json
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.testing.forked_scripts import run_script


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    text = Path(str(subprocess.__file__)).read_text(encoding="utf-8")
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")))
    return path


def run(*arguments: Any, before: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
    return run_script("tools/train_tokenizer.py", *map(str, arguments), before=before)


def test_byte_level_bpe_equals_the_librarys_own_trainer(tmp_path: Path, corpus: Path) -> None:
    result = run("--input", corpus, "--output-dir", tmp_path / "t", "--vocab-size", 600)
    assert result.returncode == 0, result.stderr
    assert "GPT2BPETokenizer of 600 tokens" in result.stdout
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    reference = tokenizers.ByteLevelBPETokenizer()
    reference.train_from_iterator(texts, 600, 2, show_progress=False, special_tokens=["<|endoftext|>"])
    assert json.loads((tmp_path / "t" / "vocab.json").read_text()) == reference.get_vocab()
    made = build_tokenizer(
        TokenizerConfig(
            vocab_file=str(tmp_path / "t" / "vocab.json"), merge_file=str(tmp_path / "t" / "merges.txt")
        )
    )
    assert [made.tokenize(text) for text in texts] == [reference.encode(text).ids for text in texts]
    assert made.detokenize([made.eod]) == "<|endoftext|>"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepiece_model_is_of_the_asked_kind(tmp_path: Path, corpus: Path, model_type: str) -> None:
    result = run(
        *("--input", corpus, "--output-dir", tmp_path, "--vocab-size", 500),
        *("--tokenizer-type", "SentencePieceTokenizer", "--model-type", model_type),
    )
    assert result.returncode == 0, result.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.get_piece_size() == 500
    text = "def f():\n\treturn  'é'\n"
    assert processor.decode(processor.encode(text)) == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "100"], "--vocab-size 100: must be at least 257"),
        (
            ["--vocab-size", "600", "--special-tokens", "<s>"],
            "--special-tokens <s>: must include <|endoftext|>",
        ),
        (
            ["--vocab-size", "90000", "--tokenizer-type", "SentencePieceTokenizer"],
            "--vocab-size 90000: must be at most ",
        ),
        (["--input", "/dev/null"], "--input /dev/null: has no text to train a tokenizer on"),
        (
            ["--input", "/dev/null", "--tokenizer-type", "SentencePieceTokenizer"],
            "--input /dev/null: has no text to train a tokenizer on",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, corpus: Path, flags: list[str], message: str
) -> None:
    given = [] if "--input" in flags else ["--input", corpus]
    result = run(*given, "--output-dir", tmp_path, *flags)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{oops\n')
    result = run("--input", tmp_path / "bad.jsonl", "--output-dir", tmp_path / "t", "--vocab-size", 300)
    assert result.returncode == 2
    assert f"{tmp_path}/bad.jsonl: byte 17: malformed JSON" in result.stderr
    assert not (tmp_path / "t").exists()


def test_documents_without_text_train_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    result = run("--input", tmp_path / "empty.jsonl", "--output-dir", tmp_path / "t")
    assert result.returncode == 2
    assert "empty.jsonl: has no text to train a tokenizer on" in result.stderr
    assert not (tmp_path / "t").exists()


def test_the_size_that_a_small_text_yields_is_said(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("hello small world, hello small text\n")
    result = run("--input", tmp_path / "small.txt", "--output-dir", tmp_path / "t", "--vocab-size", "32768")
    assert result.returncode == 0, result.stderr
    size = len(json.loads((tmp_path / "t" / "vocab.json").read_text()))
    assert f"{size} tokens\nthis is fewer than --vocab-size 32768" in result.stdout


def _limit_file_size() -> None:  # stands in for a full disk: merges.txt fits, tokenizer.json does not
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_leaves_the_files_of_before(tmp_path: Path, corpus: Path) -> None:
    flags = ["--input", corpus, "--output-dir", tmp_path, "--vocab-size"]
    assert run(*flags, "300").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(*flags, "1500", before=_limit_file_size)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}: File too large\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
