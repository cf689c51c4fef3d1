"""tools/preprocess_per_layer_data.py, from tokenized data to what training reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.corpora.dataset_checks import verify_dataset
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest, write_manifest
from megatron_ext.data.per_layer.alignment import check_aligned
from megatron_ext.data.per_layer.per_layer_table import load_per_layer_table, rows_of, save_table, table_path
from megatron_ext.data.per_layer.strategies import STRATEGIES
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.testing.tiny_datasets import write_dataset
from tools.preprocess_per_layer_data import main

TEXTS = [f"The cat number {number} is not on the mat, def f(x{number}): return x" for number in range(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a byte-level BPE and the tokenized texts; GPT-2's file names."""
    folder = tmp_path_factory.mktemp("trained")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "gpt2-vocab.json")
    (folder / "merges.txt").rename(folder / "gpt2-merges.txt")
    tokenizer = the_tokenizer(folder)
    documents = [[[*tokenizer.tokenize(text), tokenizer.eod]] for text in TEXTS]
    write_dataset(f"{folder}/my_data_text_document", documents)
    write_manifest(f"{folder}/my_data_text_document", tool="t", tokenizer=tokenizer.describe(), inputs=[])
    write_dataset(f"{folder}/held_out_text_document", documents[:3])
    return folder


@pytest.fixture
def folder(trained: Any, tmp_path: Path) -> Any:
    shutil.copytree(trained, tmp_path / "data")
    return tmp_path / "data"


def the_tokenizer(folder: Any) -> Any:
    return build_tokenizer(
        TokenizerConfig(vocab_file=f"{folder}/gpt2-vocab.json", merge_file=f"{folder}/gpt2-merges.txt")
    )


def document_003(folder: Any, *more: Any) -> Any:
    """The command line of document 003, with more flags behind it."""
    return [
        *("--input", "your_data.json"),
        *("--output-prefix", f"{folder}/my_data"),
        *("--per-layer-output-prefix", f"{folder}/my_data_per_layer"),
        *("--vocab-file", f"{folder}/gpt2-vocab.json"),
        *("--per-layer-vocab-file", f"{folder}/per_layer_vocab.json"),
        *("--per-layer-vocab-size", "100"),
        *more,
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_document_003s_command_makes_vocabulary_table_and_aligned_data(
    folder: Any, strategy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    main(document_003(folder, "--per-layer-strategy", strategy))
    source, output = f"{folder}/my_data_text_document", f"{folder}/my_data_per_layer_text_document"
    tokenizer = the_tokenizer(folder)
    tokens, ids = open_index(source).tokens(), open_index(output).tokens()
    is_identity, hashes = strategy == "identity", strategy in ("bigram_hash", "trigram_hash")
    has_none = is_identity or hashes
    table = load_per_layer_table(
        strategy, tokenizer=tokenizer, vocab_file=None if has_none else f"{folder}/per_layer_vocab.json"
    )
    if hashes:
        numbers = tokens.astype(np.int64) + 1
        assert ids[0] == numbers[0]
        assert ids[1] == numbers[1] + (numbers[0] << 21)
        assert ids[2] == numbers[2] + (numbers[1] << 21) + (strategy == "trigram_hash") * (numbers[0] << 42)
        second = 1 + tokens.tolist().index(tokenizer.eod)  # a document's first token
        assert ids[second] == numbers[second]
    elif strategy == "attention_guidance":
        first = next(index for index, token in enumerate(tokens.tolist()) if token == tokenizer.eod)
        assert ids[0] == 2
        assert ids[10] == 3
        assert ids[first] == 4
        assert np.array_equal(ids[1:10], table[tokens[1:10]])
    else:
        assert np.array_equal(ids, table[tokens])
    vocab_size = tokenizer.vocab_size if is_identity else 100
    check_aligned(source, output, strategy=strategy, vocab_size=vocab_size)
    check_dataset(output, tokenizer.fingerprint())
    manifest, source_manifest = read_manifest(output), read_manifest(source)
    assert manifest is not None
    assert source_manifest is not None
    assert manifest["per_layer"]["strategy"] == strategy
    assert manifest["per_layer"]["source_checksum"] == source_manifest["checksums"]["bin"]
    assert manifest["inputs"][0]["path"] == "your_data.json"
    assert "per-layer ids: all are what" in verify_dataset(output)[-1]
    if hashes:
        assert manifest["per_layer"]["vocab_size"] is None  # training decides the number of rows
    if not has_none:
        vocabulary = json.loads((folder / "per_layer_vocab.json").read_text())
        assert len(vocabulary) <= 100
        assert {"the", "cat", "def", "(", "is", "not"} <= set(vocabulary)
        printed = capsys.readouterr().out
        assert f"{tokens.size:,} tokens" in printed
        rows = rows_of(table)
        marks = {2, 3, 4} if strategy == "attention_guidance" else set()
        assert f"{len({*table.tolist(), *marks})} of {rows} used" in printed
        assert manifest["per_layer"]["vocab_size"] == rows < len(vocabulary)
        assert {*range(15), *table.tolist()} == set(range(rows))


def test_held_out_data_gets_the_training_vocabulary(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(document_003(folder))
    before = (
        (folder / "per_layer_vocab.json").read_bytes(),
        (folder / "per_layer_vocab.syntax_focus.npz").read_bytes(),
    )
    main(
        document_003(
            folder,
            "--output-prefix",
            f"{folder}/held_out",
            "--per-layer-output-prefix",
            f"{folder}/held_out_pl",
        )
    )
    after = (
        (folder / "per_layer_vocab.json").read_bytes(),
        (folder / "per_layer_vocab.syntax_focus.npz").read_bytes(),
    )
    assert after == before
    assert "used unchanged" in capsys.readouterr().out
    check_aligned(f"{folder}/held_out_text_document", f"{folder}/held_out_pl_text_document")


def test_a_table_that_is_there_stays_as_it_is(folder: Any) -> None:
    main(document_003(folder, "--per-layer-strategy", "random_subset"))
    path, tokenizer = f"{folder}/per_layer_vocab.json", the_tokenizer(folder)
    with pytest.raises(
        ValueError, match=r"--seed 5: .*random_subset\.npz was made with --seed 1234; give that"
    ):
        main(document_003(folder, "--per-layer-strategy", "random_subset", "--seed", "5"))
    sparse = np.full(
        tokenizer.vocab_size, 90, dtype=np.int32
    )  # as an earlier version numbered: by the vocabulary
    save_table(path, "syntax_focus", sparse, tokenizer_fingerprint=tokenizer.fingerprint(), seed=1234)
    before = Path(table_path(path, "syntax_focus")).read_bytes()
    main(document_003(folder))
    assert Path(table_path(path, "syntax_focus")).read_bytes() == before
    assert set(open_index(f"{folder}/my_data_per_layer_text_document").tokens().tolist()) == {90}


def test_without_a_size_a_vocabulary_of_any_size_is_used(
    folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(document_003(folder))
    monkeypatch.setattr("tools.preprocess_per_layer_data.DEFAULT_VOCAB_SIZE", 20)
    flags = document_003(folder)
    at = flags.index("--per-layer-vocab-size")
    main(flags[:at] + flags[at + 2 :])
    assert "per_layer_vocab.json: used unchanged" in capsys.readouterr().out


def test_missing_tokenized_data_names_the_command_that_makes_it(folder: Any) -> None:
    message = (
        r"tokenized data not found: .*nope_text_document\.bin and \.idx; make it with: python"
        r" tools/preprocess_data\.py --input your_data\.json --output-prefix .*nope "
    )
    with pytest.raises(FileNotFoundError, match=message):
        main(document_003(folder, "--output-prefix", f"{folder}/nope"))


def test_wrong_input_is_refused_and_leaves_no_dataset(
    folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(document_003(folder, "--per-layer-output-prefix", f"{folder}/my_data"))
    assert "would overwrite --output-prefix" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--per-layer-vocab-size 3 must be at least 15"):
        main(document_003(folder, "--per-layer-vocab-size", "3"))
    main(document_003(folder))
    with pytest.raises(
        ValueError, match=r"per_layer_vocab\.json has \d+ entries, more than --per-layer-vocab-size 20"
    ):
        main(document_003(folder, "--per-layer-vocab-size", "20"))
    binary = folder / "my_data_text_document.bin"
    binary.write_bytes(binary.read_bytes()[:-2])
    for path in folder.glob("my_data_per_layer*"):
        path.unlink()
    with pytest.raises(ValueError, match="truncated or corrupt"):
        main(document_003(folder))
    assert not list(folder.glob("my_data_per_layer*"))
    assert not list(folder.glob("*.tmp"))
