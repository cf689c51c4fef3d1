"""Manifests, and the checks a training run makes at start-up."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.indexed.manifest import check_dataset, read_manifest, write_atomically, write_manifest
from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer, NullTokenizer
from megatron_ext.testing.tiny_datasets import write_dataset


@pytest.fixture
def prefix(tmp_path: Path) -> Any:
    write_dataset(str(tmp_path / "d"), [[[1, 2, 3]], [], [[4], [5, 6]]])
    return str(tmp_path / "d")


def test_manifest_records_counts_sizes_and_checksums(prefix: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("abc")
    write_manifest(
        prefix, tool="t", tokenizer={"fingerprint": "f"}, inputs=[str(source), "-"], extra={"more": 1}
    )
    manifest = json.loads((tmp_path / "d.json").read_text())
    assert manifest["counts"] == {"documents": 3, "sequences": 3, "tokens": 6}
    assert manifest["dtype"] == "uint16"
    assert manifest["inputs"] == [{"path": str(source), "bytes": 3}, {"path": "-", "bytes": None}]
    assert manifest["more"] == 1
    for name in ("bin", "idx"):
        content = (tmp_path / f"d.{name}").read_bytes()
        assert manifest["sizes"][name] == len(content)
        assert manifest["checksums"][name] == hashlib.sha256(content).hexdigest()
    assert manifest == read_manifest(prefix)


def test_equal_data_gives_an_equal_manifest(prefix: Any, tmp_path: Path) -> None:
    write_manifest(prefix, tool="t", tokenizer=None, inputs=[])
    first = (tmp_path / "d.json").read_bytes()
    write_manifest(prefix, tool="t", tokenizer=None, inputs=[])
    assert (tmp_path / "d.json").read_bytes() == first


def test_dataset_without_a_manifest_passes(prefix: Any) -> None:
    assert check_dataset(prefix, "any").num_tokens == 6


def test_another_tokenizer_is_refused_and_the_same_passes(prefix: Any) -> None:
    write_manifest(prefix, tool="t", tokenizer={"fingerprint": "made"}, inputs=[])
    check_dataset(prefix, "made")
    check_dataset(prefix, None)
    with pytest.raises(ValueError, match="was made with the tokenizer made, but this run uses other"):
        check_dataset(prefix, "other")


def test_tokenizers_are_told_apart_by_class_size_and_files(prefix: Any) -> None:
    write_manifest(prefix, tool="t", tokenizer=ByteLevelTokenizer().describe(), inputs=[])
    check_dataset(prefix, ByteLevelTokenizer())
    ours = NullTokenizer(9)
    ours.files = ("words/vocab.json",)
    with pytest.raises(
        ValueError, match="was made with the tokenizer ByteLevelTokenizer, 257 ids, fingerprint "
    ) as error:
        check_dataset(prefix, ours)
    assert "this run uses NullTokenizer, 10 ids, words/vocab.json, fingerprint " in str(error.value)


def test_a_run_is_told_the_flags_of_the_datasets_tokenizer(prefix: Any) -> None:
    made_with = {"class": "HuggingFaceTokenizer", "vocab_size": 9, "eod": 0, "fingerprint": "made"}
    write_manifest(prefix, tool="t", tokenizer=made_with, inputs=[])
    again = "tokenize the text again with the tokenizer of this run (tools/preprocess_data.py)"
    with pytest.raises(ValueError, match="was made with the tokenizer") as error:
        check_dataset(prefix, ByteLevelTokenizer())
    flags = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model ..."
    assert str(error.value).endswith(f"; pass the dataset's ({flags}), or {again}")
    with pytest.raises(ValueError, match="was made with the tokenizer") as error:
        check_dataset(prefix, "the fingerprint of a checkpoint's tokenizer")
    assert str(error.value).endswith(f"; {again}")


def test_a_run_is_told_the_further_flags_of_the_datasets_tokenizer(prefix: Any) -> None:
    made_with = {
        "class": "LegacySentencePieceTokenizer",
        "fingerprint": "made",
        "flags": "--legacy-tokenizer",
    }
    write_manifest(prefix, tool="t", tokenizer=made_with, inputs=[])
    with pytest.raises(
        ValueError, match="made with the tokenizer LegacySentencePieceTokenizer, --legacy-tokenizer"
    ):
        check_dataset(prefix, "other")
    with pytest.raises(ValueError, match="--tokenizer-type SentencePieceTokenizer .* --legacy-tokenizer"):
        check_dataset(prefix, ByteLevelTokenizer())


def test_files_replaced_under_a_manifest_are_refused(prefix: Any) -> None:
    write_manifest(prefix, tool="t", tokenizer=None, inputs=[])
    write_dataset(prefix, [[[1, 2]]])
    with pytest.raises(ValueError, match=r"d\.bin is 4 bytes, but .*d\.json recorded 12"):
        check_dataset(prefix)


def test_something_else_under_the_manifests_name_is_refused(prefix: Any, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        check_dataset(prefix)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="not a dataset manifest"):
        check_dataset(prefix)


def test_extra_keys_cannot_replace_the_manifests_own(prefix: Any) -> None:
    with pytest.raises(ValueError, match="counts"):
        write_manifest(prefix, tool="t", tokenizer=None, inputs=[], extra={"counts": {}})


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_files_are_not(tmp_path: Path) -> None:
    for name in ("d.bin.17.tmp", "d.bin.17.lengths.tmp", "d.bin.keep", "e.bin.17.tmp"):
        (tmp_path / name).write_text("left")
    script = f"""
from megatron_ext.data.indexed.manifest import write_atomically
with write_atomically({str(tmp_path / "d.bin")!r}) as temporary:
    temporary.write_text("living")
    print(temporary, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        living = Path(writer.stdout.readline().strip())
        assert not list(tmp_path.glob("d.bin.17.*"))
        with write_atomically(tmp_path / "d.bin") as temporary:
            temporary.write_text("second")
        assert living.read_text() == "living"
        writer.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"d.bin", "d.bin.keep", "e.bin.17.tmp", living.name}
    with write_atomically(tmp_path / "d.bin") as temporary:
        temporary.write_text("third")
    assert {path.name for path in tmp_path.iterdir()} == {"d.bin", "d.bin.keep", "e.bin.17.tmp"}
