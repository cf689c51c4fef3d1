"""tools/data.py: what verify finds, what inspect shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.indexed.manifest import manifest_path, sha256_of, write_manifest
from megatron_ext.data.per_layer.per_layer_ids import write_aligned
from megatron_ext.data.per_layer.per_layer_table import save_table
from megatron_ext.data.per_layer.per_layer_vocab import (
    build_table,
    build_vocabulary,
    save_vocabulary,
    token_forms,
)
from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer
from megatron_ext.testing.tiny_datasets import write_dataset
from tools.data import main

TEXTS = ["the cat", "a dog and a bird", "x = (1, 2)"]

ROOT = Path(__file__).parents[3]


@pytest.fixture
def prefix(tmp_path: Path) -> Any:
    """A byte-level dataset with an empty document, its vocabulary and its per-layer data, all with manifests."""
    tokenizer = ByteLevelTokenizer()
    documents = [[[*tokenizer.tokenize(text), tokenizer.eod]] for text in TEXTS]
    write_dataset(f"{tmp_path}/d", [*documents, []])
    write_manifest(f"{tmp_path}/d", tool="t", tokenizer=tokenizer.describe(), inputs=["texts"])
    make_per_layer(tmp_path, tokenizer)
    return f"{tmp_path}/d"


def make_per_layer(folder: Any, tokenizer: Any, strategy: Any = "attention_guidance") -> None:
    index = open_index(f"{folder}/d")
    forms = token_forms(tokenizer)
    vocabulary = build_vocabulary(forms, np.bincount(index.tokens(), minlength=tokenizer.vocab_size), 40)
    save_vocabulary(f"{folder}/v.json", vocabulary)
    table = build_table(strategy, forms, vocabulary)
    save_table(f"{folder}/v.json", strategy, table, tokenizer_fingerprint=tokenizer.fingerprint(), seed=1)
    write_aligned(
        index, f"{folder}/pl", table, strategy, eod=tokenizer.eod, per_layer_vocab_size=len(vocabulary)
    )
    per_layer = {
        "strategy": strategy,
        "vocab_size": len(vocabulary),
        "source": f"{folder}/d",
        "source_checksum": sha256_of(f"{folder}/d.bin"),
        "vocab_file": f"{folder}/v.json",
        "vocab_checksum": sha256_of(f"{folder}/v.json"),
    }
    write_manifest(
        f"{folder}/pl", tool="t", tokenizer=tokenizer.describe(), inputs=[], extra={"per_layer": per_layer}
    )


def verify(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    code = main(["verify", *arguments])
    return code, capsys.readouterr().out


def change(path: Any, offset: Any, value: Any = None) -> None:
    """Flip one byte of a file, or set it."""
    content = bytearray(Path(path).read_bytes())
    content[offset] = content[offset] ^ 1 if value is None else value
    Path(path).write_bytes(bytes(content))


def test_sound_data_is_ok_and_everything_was_checked(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = verify(capsys, prefix, f"{tmp_path}/pl", "--tokenizer-type", "ByteLevelTokenizer")
    assert code == 0
    assert f"{prefix}: ok" in out
    assert "4 documents, 3 sequences" in out
    assert "counts and checksums agree" in out
    assert "all below 257" in out
    assert f"documents and lengths equal those of {prefix}" in out
    assert "all are what attention_guidance gives" in out
    assert "not checked" not in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d, pl: change(f"{d}.bin", 4), "checksum .* but the manifest records"),
        (lambda d, pl: change(f"{d}.bin", 5, 9), "checksum|holds token id"),
        (lambda d, pl: change(f"{d}.idx", 34), "does not start where the sequence before it ends"),
        (lambda d, pl: Path(f"{d}.bin").write_bytes(b"ab"), r"d\.bin is 2 bytes, but"),
        (lambda d, pl: Path(f"{d}.idx").unlink(), r"data file not found: .*d\.idx"),
        (lambda d, pl: Path(manifest_path(d)).write_text("{}"), "is not a dataset manifest"),
    ],
)
def test_damage_is_found_and_the_exit_code_says_so(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: Any
) -> None:
    damage(prefix, f"{tmp_path}/pl")
    code, out = verify(capsys, prefix)
    assert code == 1
    assert f"{prefix}: BROKEN" in out
    with pytest.raises(ValueError, match=message):
        raise ValueError(out)


def test_a_broken_dataset_does_not_hide_the_next(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = verify(capsys, f"{tmp_path}/nope", prefix)
    assert code == 1
    assert f"{tmp_path}/nope: BROKEN" in out
    assert f"{prefix}: ok" in out


def test_a_wrong_per_layer_id_is_found_even_with_a_right_checksum(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(Path(f"{tmp_path}/pl.json").read_text())
    change(f"{tmp_path}/pl.bin", 2 * 9)
    manifest["checksums"]["bin"] = sha256_of(f"{tmp_path}/pl.bin")
    Path(f"{tmp_path}/pl.json").write_text(json.dumps(manifest))
    code, out = verify(capsys, f"{tmp_path}/pl")
    assert code == 1
    assert "the per-layer id of token 9 is" in out


def test_per_layer_data_of_remade_main_data_is_found(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [[[*ByteLevelTokenizer().tokenize(text.upper()), 256]] for text in TEXTS]
    write_dataset(prefix, [*documents, []])
    write_manifest(prefix, tool="t", tokenizer=ByteLevelTokenizer().describe(), inputs=[])
    code, out = verify(capsys, f"{tmp_path}/pl")
    assert code == 1
    assert "the main data was made again after the per-layer data" in out


def test_token_ids_beyond_the_vocabulary_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(f"{tmp_path}/d", [[[1, 2, 300]]])
    code, out = verify(capsys, f"{tmp_path}/d")
    assert code == 0
    assert "no" in out and "ids 1 to 300, the vocabulary's size is not known" in out
    code, out = verify(capsys, f"{tmp_path}/d", "--tokenizer-type", "ByteLevelTokenizer")
    assert code == 1
    assert "holds token id 300, but the vocabulary has 257 ids" in out


def test_missing_main_data_and_tables_are_said_to_be_unchecked(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.attention_guidance.npz").unlink()
    assert "their table" in verify(capsys, f"{tmp_path}/pl")[1]
    Path(f"{prefix}.idx").rename(tmp_path / "moved.idx")
    Path(f"{prefix}.bin").rename(tmp_path / "moved.bin")
    assert "was not found (give its prefix with --source)" in verify(capsys, f"{tmp_path}/pl")[1]
    assert "equal those of" in verify(capsys, f"{tmp_path}/pl", "--source", f"{tmp_path}/moved")[1]


def test_inspect_shows_counts_lengths_text_and_per_layer_ids(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokenizer-type", "ByteLevelTokenizer", "--document", "1", "--max-tokens", "12"]
    assert main(["inspect", prefix, *arguments, "--per-layer-data-path", f"{tmp_path}/pl"]) == 0
    out = capsys.readouterr().out
    assert "4 documents, 3 sequences" in out
    assert "made by t" in out
    assert "document 1, tokens 0 to 11 of 17:\na dog and a \n" in out
    rows = [line.split() for line in out.splitlines()[-12:]]
    assert rows[0][0] == str(ord("a"))
    assert rows[0][-1] == "<|layer_start|>"
    assert rows[10][-1] == "<|attention|>"
    assert main(["inspect", prefix, "--document", "-1"]) == 0
    assert "document 3, tokens 0 to -1 of 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--document 9: must be from -4 to 3 .*has 4 documents"):
        main(["inspect", prefix, "--document", "9"])


def test_merge_split_and_shuffle_are_commands(
    prefix: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{prefix}.{suffix}", f"{tmp_path}/copy.{suffix}")
    with pytest.raises(ValueError, match="are the same file; give it once"):
        main(["merge", prefix, prefix, "--output-prefix", f"{tmp_path}/two"])
    assert main(["merge", prefix, f"{tmp_path}/copy", "--output-prefix", f"{tmp_path}/two"]) == 0
    assert main(["shuffle", f"{tmp_path}/two", "--output-prefix", f"{tmp_path}/mixed", "--seed", "3"]) == 0
    parts = [f"{tmp_path}/x", f"{tmp_path}/y"]
    assert main(["split", f"{tmp_path}/mixed", "--output-prefix", *parts, "--shares", "3", "1"]) == 0
    assert f"{tmp_path}/x.bin/.idx: 6 documents" in capsys.readouterr().out
    assert main(["verify", f"{tmp_path}/two", f"{tmp_path}/mixed", *parts]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_inspect_shows_any_text_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    text = "one\u2028two\x0cthree\x85漢"
    write_dataset(f"{tmp_path}/d", [[[*text.encode(), 256]]])
    command = [sys.executable, str(ROOT / "tools" / "data.py"), "inspect", f"{tmp_path}/d", "--document", "0"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    result = subprocess.run(
        [*command, "--tokenizer-type", "ByteLevelTokenizer"], env=environment, capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    written = "utf-8" if encoding == "ascii" else encoding  # an ASCII terminal is one whose locale is not set
    assert text.encode(written, errors="backslashreplace") in result.stdout


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown command 'nope': must be one of verify, inspect"):
        main(["nope"])
