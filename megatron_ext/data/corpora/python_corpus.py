"""A corpus of real text that comes with every Python installation: CPython's own documentation and library.

Three kinds of document, in order of preference when a size limit is given:

    topics      the language reference as `help()` shows it (`pydoc_data.topics`)
    docstrings  all docstrings of one standard-library module
    sources     the source code of one standard-library module

The same interpreter gives the same bytes. Everything that comes from one file falls on the same side of the
train / held-out split (the split is by hash of its origin), so a held-out docstring is never in a training source.
The corpus is meant for quick starts, tests and benchmarks, not for training a real model.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_ext.data.indexed.manifest import write_atomically

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
}


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    kind: str
    """`topics`, `docstrings` or `sources`."""

    origin: str
    """Topic name, or path of the module inside the standard library; decides whether the document is held out."""

    text: str
    """Content of the document."""


@dataclass(frozen=True)
class CorpusCounts:
    """Amount of text in one output file."""

    documents: int
    """Number of documents, repetitions included."""

    text_bytes: int
    """Number of UTF-8 bytes in all texts, repetitions included."""


def standard_library_documents() -> Iterator[Document]:
    """Yields all documents of this interpreter: topics, then docstrings, then sources, each sorted by origin."""
    return _without_duplicates(_documents(Path(sysconfig.get_paths()["stdlib"])))


def write_corpus(
    train: str,
    held_out: str,
    *,
    max_bytes: int | None = None,
    held_out_fraction: float = 0.05,
    repeat: int = 1,
) -> tuple[CorpusCounts, CorpusCounts]:
    """Writes the corpus as two files of JSON lines `{"text": ...}`, both atomically.

    Args:
        train: path of the training file.
        held_out: path of the held-out file.
        max_bytes: largest total size of the texts in both files, before `repeat`. Documents are taken in order of
            preference until the next one would exceed this size; None takes all.
        held_out_fraction: expected share of the topics and modules that are held out, in (0, 1).
        repeat: how many times the training documents are written, to make a large input.

    Returns:
        Counts of the training and of the held-out file.

    Raises:
        ValueError: an argument is out of range, or one of the two files would be empty.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"--max-bytes must be positive, not {max_bytes}")
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"--held-out-fraction must be between 0 and 1, not {held_out_fraction}")
    if repeat < 1:
        raise ValueError(f"--repeat must be at least 1, not {repeat}")
    if Path(train).resolve() == Path(held_out).resolve():
        raise ValueError(f"--output and --held-out are the same file: {train}")
    documents = _take(standard_library_documents(), max_bytes)
    documents.sort(key=lambda document: _hash(document.text))  # mixes the kinds, in a reproducible order
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[_is_held_out(document.origin, held_out_fraction)].append(document.text)
    if not sides[0] or not sides[1]:
        limits = f"--held-out-fraction {held_out_fraction}"
        if max_bytes is not None:
            limits = f"--max-bytes {max_bytes} and {limits}"
        raise ValueError(
            f"{limits} leave {len(sides[0])} training and {len(sides[1])} held-out documents; "
            "both files need at least one"
        )
    with write_atomically(train) as train_path, write_atomically(held_out) as held_out_path:
        with train_path.open("w", encoding="utf-8") as stream:
            for _ in range(repeat):
                _write_lines(stream, sides[0])
        with held_out_path.open("w", encoding="utf-8") as stream:
            _write_lines(stream, sides[1])
    return _count(sides[0], repeat), _count(sides[1], 1)


def _documents(library: Path) -> Iterator[Document]:
    """Yields topics, docstrings and sources, each read only when needed, so that a small corpus is quick to make."""
    yield from _topics()
    for origin, source in _modules(library):
        if text := _docstrings(source):
            yield Document("docstrings", origin, text)
    for origin, source in _modules(library):
        yield Document("sources", origin, source)


def _topics() -> list[Document]:
    """Returns the topics of the language reference; an empty list if this Python was distributed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [Document("topics", f"topic:{name}", topics[name]) for name in sorted(topics)]


def _modules(library: Path) -> Iterator[tuple[str, str]]:
    """Yields (path inside the library, source code) of every module, sorted; skips files that are not UTF-8."""
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if _SKIPPED_FOLDERS.intersection(inside.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if source.strip():
            yield inside.as_posix(), source


def _docstrings(source: str) -> str:
    """Returns all docstrings of a module, each after the name of its object; "" if there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own invalid escapes
            tree = ast.parse(source)
    except SyntaxError:  # for example a template, which is not valid Python
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                parts.append(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
    return "\n\n".join(parts).encode("utf-8", "replace").decode()  # a docstring may hold lone surrogates


def _without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents, leaving out those whose text has occurred before."""
    seen = set()
    for document in documents:
        key = _hash(document.text)
        if key not in seen:
            seen.add(key)
            yield document


def _take(documents: Iterable[Document], max_bytes: int | None) -> list[Document]:
    """Returns the documents, in order, that come before the first one that would exceed the limit."""
    taken, total = [], 0
    for document in documents:
        total += len(document.text.encode())
        if max_bytes is not None and total > max_bytes:
            break
        taken.append(document)
    return taken


def _hash(text: str) -> bytes:
    """Returns the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def _is_held_out(origin: str, fraction: float) -> bool:
    """Returns whether this origin is held out: its hash, as a number in [0, 1), is below the fraction."""
    return int.from_bytes(_hash(origin)[:8], "big") / 2**64 < fraction


def _write_lines(stream: TextIO, texts: list[str]) -> None:
    """Writes one JSON object per line."""
    stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _count(texts: list[str], repeat: int) -> CorpusCounts:
    """Counts the documents and bytes of a file that contains all texts, repeated `repeat` times."""
    return CorpusCounts(len(texts) * repeat, sum(len(text.encode()) for text in texts) * repeat)
