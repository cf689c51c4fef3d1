"""The corpus of the standard library."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.corpora import python_corpus as corpus

MODULES: dict[str, str | bytes] = {
    "one.py": '"""First module."""\n\ndef f():\n    """Does f."""\n',
    "two.py": "x = 1\n",
    "package/three.py": '"""Third."""\n\nclass C:\n    """A class, \\ud800."""\n',
    "broken.py": "def (:\n",
    "empty.py": "\n",
    "same.py": "x = 1\n",
    "test/skipped.py": "y = 2\n",
    "latin.py": b"z = '\xff'\n",
    **{f"more{number}.py": f"value = {number}\n" for number in range(60)},
}


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A standard library of a few modules, and no topics but two."""
    for name, source in MODULES.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "pydoc_data.topics.topics", {"while": "The while statement", "if": "The if statement"}
    )
    return tmp_path


def read(path: Any) -> Any:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_documents_are_topics_docstrings_and_sources_without_duplicates(small_library: Any) -> None:
    documents = list(corpus.standard_library_documents())
    assert [(d.kind, d.text) for d in documents[:4]] == [
        ("topics", "The if statement"),
        ("topics", "The while statement"),
        ("docstrings", "First module.\n\nf\n\nDoes f."),
        ("docstrings", "Third.\n\nC\n\nA class, ?."),
    ]
    sources = {d.origin for d in documents if d.kind == "sources"}
    kept = set(MODULES) - {"empty.py", "test/skipped.py", "latin.py", "two.py"}  # two.py equals same.py
    assert sources == kept


def test_files_are_disjoint_by_origin_complete_and_the_same_every_time(small_library: Any) -> None:
    train, held_out = small_library / "out/train.jsonl", small_library / "out/held.jsonl"
    counts = corpus.write_corpus(str(train), str(held_out), held_out_fraction=0.3)
    first = train.read_bytes(), held_out.read_bytes()
    corpus.write_corpus(str(train), str(held_out), held_out_fraction=0.3)
    assert (train.read_bytes(), held_out.read_bytes()) == first
    documents = list(corpus.standard_library_documents())
    texts = {d.text: d.origin for d in documents}
    assert sorted(read(train) + read(held_out)) == sorted(texts)
    assert not {texts[text] for text in read(train)} & {texts[text] for text in read(held_out)}
    assert counts[0].documents == len(read(train))
    assert counts[1].text_bytes == sum(len(text.encode()) for text in read(held_out))
    assert 0.1 < counts[1].documents / len(documents) < 0.5
    assert sorted(path.name for path in (small_library / "out").iterdir()) == ["held.jsonl", "train.jsonl"]


def test_size_limit_prefers_documentation_and_repeat_multiplies_the_training_file(small_library: Any) -> None:
    train, held_out = small_library / "train.jsonl", small_library / "held.jsonl"
    total = sum(len(d.text.encode()) for d in list(corpus.standard_library_documents())[:40])
    once = corpus.write_corpus(str(train), str(held_out), max_bytes=total, held_out_fraction=0.5)
    assert once[0].text_bytes + once[1].text_bytes == total
    lines = train.read_text().splitlines()
    thrice = corpus.write_corpus(str(train), str(held_out), max_bytes=total, held_out_fraction=0.5, repeat=3)
    assert train.read_text().splitlines() == lines * 3
    assert thrice[0].text_bytes == 3 * once[0].text_bytes
    assert thrice[1] == once[1]


def test_arguments_out_of_range_are_refused_and_nothing_is_written(small_library: Any) -> None:
    out = str(small_library / "a.jsonl"), str(small_library / "b.jsonl")
    for arguments, message in (
        ({"max_bytes": 0}, "--max-bytes"),
        ({"repeat": 0}, "--repeat"),
        ({"held_out_fraction": 1.0}, "--held-out-fraction"),
        ({"max_bytes": 5}, "--max-bytes 5 and --held-out-fraction .* leave 0 training"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus.write_corpus(*out, **arguments)
    with pytest.raises(ValueError, match="are the same file"):
        corpus.write_corpus(out[0], out[0])
    assert not (small_library / "a.jsonl").exists()


def test_this_interpreter_has_a_corpus_of_real_text(tmp_path: Path) -> None:
    train, _ = corpus.write_corpus(str(tmp_path / "t"), str(tmp_path / "h"), max_bytes=600_000)
    assert train.text_bytes > 400_000
    assert any("Return" in text for text in read(tmp_path / "t"))
