"""tools/preprocess_data.py as a user runs it: results, errors, kills and resumption."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.corpora.train_tokenizer import train_byte_level_bpe
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.testing.forked_scripts import run_script

ROOT = Path(__file__).parents[3]
TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]


def real_documents() -> Any:
    """Functions of the standard library, some of them empty texts."""
    documents = []
    for name in (
        "argparse",
        "typing",
        "inspect",
        "decimal",
        "tarfile",
        "difflib",
        "doctest",
        "pathlib",
        "statistics",
    ):
        module = __import__("_pydecimal" if name == "decimal" else name)
        documents += Path(str(module.__file__)).read_text(encoding="utf-8").split("\ndef ")
    return ["" if i % 97 == 5 else text for i, text in enumerate(documents)]


@pytest.fixture(scope="module")
def tokenizer_flags(tmp_path_factory: Any) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(iter(real_documents()), str(directory), 2000, ("<|endoftext|>",), 2)
    return ["--vocab-file", f"{directory}/vocab.json", "--merge-file", f"{directory}/merges.txt"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.dumps({"text": text}) for text in real_documents()]
    path.write_text("\n".join(f"{row}" for row in rows * 16) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any, corpus: Any, tokenizer_flags: Any) -> Any:
    """What Megatron-LM's loop writes: `(bin, idx)` bytes."""
    tokenizer = build_tokenizer(TokenizerConfig(vocab_file=tokenizer_flags[1], merge_file=tokenizer_flags[3]))
    prefix = str(tmp_path_factory.mktemp("expected") / "ref")
    import numpy as np

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    known = {}
    for line in corpus.read_text().splitlines():
        if line not in known:
            known[line] = tokenizer.tokenize(json.loads(line)["text"])
        ids = known[line] + ([tokenizer.eod] if known[line] else [])
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def run(*arguments: Any, **options: Any) -> Any:
    if not options:
        return run_script("tools/preprocess_data.py", *map(str, arguments))
    return subprocess.run(
        [*TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def outputs(prefix: Any, key: Any = "text") -> Any:
    return tuple(Path(f"{prefix}_{key}_document.{suffix}").read_bytes() for suffix in ("bin", "idx"))


def left_behind(directory: Any) -> Any:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("workers", "more"),
    [(1, ()), (3, ("--encoder", "reference")), (2, ("--partitions", 2, "--keep-sequential-samples"))],
)
def test_result_is_mcores_whatever_the_workers(
    tmp_path: Path, corpus: Any, tokenizer_flags: Any, expected: Any, workers: Any, more: Any
) -> None:
    result = run("--input", corpus, "--output_prefix", tmp_path / "new" / "c", *tokenizer_flags, "--append-eod",
                 "--workers", workers, *more)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert outputs(tmp_path / "new" / "c") == expected
    assert left_behind(tmp_path / "new") == [f"c_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    assert ("encoded with reference" if "reference" in more else "encoded with gigatoken") in result.stdout
    prefix = str(tmp_path / "new" / "c_text_document")
    tokenizer = build_tokenizer(TokenizerConfig(vocab_file=tokenizer_flags[1], merge_file=tokenizer_flags[3]))
    index = check_dataset(prefix, tokenizer.fingerprint())
    assert f"{index.num_documents:,} documents" in result.stdout
    assert (read_manifest(prefix) or {})["inputs"][0]["bytes"] == corpus.stat().st_size


def test_partitions_deal_documents_in_turn_as_megatron_does(tmp_path: Path, tokenizer_flags: Any) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(11)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "dealt.jsonl").write_text("\n".join(lines[0::3] + lines[1::3] + lines[2::3]))
    run(
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "a",
        *tokenizer_flags,
        "--partitions",
        3,
    )
    run("--input", tmp_path / "dealt.jsonl", "--output-prefix", tmp_path / "b", *tokenizer_flags)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_standard_input_and_several_keys(tmp_path: Path, tokenizer_flags: Any) -> None:
    rows = "".join(json.dumps({"title": f"t{i}", "text": f"body {i}"}) + "\n" for i in range(50))
    result = run("--input", "-", "--json-keys", "title", "text", "--output-prefix", tmp_path / "c", *tokenizer_flags,
                 input=rows)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for key, word in (("title", "t{}"), ("text", "body {}")):
        (tmp_path / "one.jsonl").write_text(
            "".join(json.dumps({"text": word.format(i)}) + "\n" for i in range(50))
        )
        run("--input", tmp_path / "one.jsonl", "--output-prefix", tmp_path / "one", *tokenizer_flags)
        assert outputs(tmp_path / "c", key) == outputs(tmp_path / "one")


def test_first_documents_only(tmp_path: Path, corpus: Any, tokenizer_flags: Any) -> None:
    (tmp_path / "head.jsonl").write_text(head(corpus, 1234))
    run("--input", tmp_path / "head.jsonl", "--output-prefix", tmp_path / "a", *tokenizer_flags)
    result = run(
        "--input", corpus, "--output-prefix", tmp_path / "b", *tokenizer_flags, "--max-documents", 1234
    )
    assert "1,234 documents" in result.stdout
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def head(path: Any, count: Any) -> Any:
    return "".join(line + "\n" for line in path.read_text().split("\n")[:count])


@pytest.mark.parametrize("packed", [False, True])
def test_a_malformed_line_is_named_and_nothing_is_left(
    tmp_path: Path, corpus: Any, tokenizer_flags: Any, packed: Any
) -> None:
    import gzip

    lines = corpus.read_bytes().split(b"\n")
    number = 2 * len(lines) // 3
    lines[number] = b'{"text": "never closed'
    offset = sum(len(line) + 1 for line in lines[:number])
    path = tmp_path / ("bad.jsonl.gz" if packed else "bad.jsonl")
    path.write_bytes(gzip.compress(b"\n".join(lines), 1) if packed else b"\n".join(lines))
    out = tmp_path / "out"
    result = run("--input", path, "--output-prefix", out / "c", *tokenizer_flags, "--workers", 2)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {path}: line {number + 1}, byte {offset}: malformed JSON: Unterminated string starting "
                      "at: line 1 column 10 (char 9)"]  # fmt: skip
    assert left_behind(out) == []
    skipped = run("--input", path, "--output-prefix", out / "c", *tokenizer_flags, "--on-error", "skip")
    assert skipped.returncode == 0
    (record,) = map(json.loads, (out / "c_rejected.jsonl").read_text().splitlines())
    assert (record["file"], record["line"], record["byte_offset"]) == (str(path), number + 1, offset)
    assert "rejected: 1 lines" in skipped.stdout


def start(*arguments: Any) -> Any:
    """Starts the tool on a slow tokenizer and returns it once some pieces are finished."""
    process = subprocess.Popen(
        [*TOOL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    prefix = arguments[arguments.index("--output-prefix") + 1]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if json.loads(Path(f"{prefix}.preprocess", "state.json").read_text())["next_shard"] >= 2:
                return process
        except (OSError, ValueError):
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no piece was finished")


def children(process: Any) -> Any:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [
        pid
        for pid in map(int, path.read_text().split())
        if b"preprocess_data" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize(
    ("victim", "kill", "code"),
    [
        ("parent", signal.SIGKILL, -signal.SIGKILL),
        ("parent", signal.SIGTERM, 143),
        ("parent", signal.SIGINT, 130),
        ("group", signal.SIGTERM, 143),
        ("group", signal.SIGINT, 130),
        ("worker", signal.SIGKILL, 3),
    ],
)
def test_a_killed_run_leaves_nothing_finished_and_is_resumed(
    tmp_path: Path, corpus: Any, tokenizer_flags: Any, expected: Any, victim: Any, kill: Any, code: Any
) -> None:
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "c", *tokenizer_flags, "--append-eod"]
    process = start(*arguments, "--workers", 2, "--encoder", "reference")
    workers = children(process)
    assert len(workers) == 2
    # Held still, so that on a fast machine the run cannot finish before the signal arrives; where it is to reach the
    # workers too, the parent: else it would end them before they have it.
    held = [process.pid] if victim == "group" else workers
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    if victim == "group":
        os.killpg(process.pid, kill)
        time.sleep(0.2)
    else:
        os.kill(process.pid if victim == "parent" else workers[0], kill)
    for pid in held:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    if code == 3:
        assert f"worker process {workers[0]} ended unexpectedly (signal SIGKILL) at {corpus}" in stderr
    assert left_behind(tmp_path) == ["c.preprocess"]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    result = run(*arguments, "--workers", 1, "--resume")
    assert result.returncode == 0, result.stderr
    assert "finished pieces reused" in result.stdout
    assert outputs(tmp_path / "c") == expected
    assert left_behind(tmp_path) == [f"c_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


def test_resume_refuses_other_settings_and_changed_input(
    tmp_path: Path, corpus: Any, tokenizer_flags: Any
) -> None:
    copy = tmp_path / "in.jsonl"
    copy.write_bytes(corpus.read_bytes())
    arguments = ["--input", copy, "--output-prefix", tmp_path / "c", *tokenizer_flags]
    process = start(*arguments, "--workers", 1, "--encoder", "reference")
    process.kill()
    process.communicate()
    result = run(*arguments, "--append-eod", "--resume")
    assert (result.returncode, "--append-eod" in result.stderr) == (2, True)
    with open(copy, "a") as file:
        file.write('{"text": "more"}\n')
    result = run(*arguments, "--resume")
    assert (result.returncode, "input (path, size, time)" in result.stderr) == (2, True)
    assert run(*arguments).returncode == 0
    assert not (tmp_path / "c.preprocess").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, corpus: Any, tokenizer_flags: Any
) -> None:
    def limit_file_size() -> None:  # stands in for a full disk: writing beyond it fails in the same calls
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = run(
        "--input", corpus, "--output-prefix", tmp_path / "c", *tokenizer_flags, preexec_fn=limit_file_size
    )
    assert result.returncode == 2
    message = f"error: {tmp_path}/c: File too large (temporary files are removed)"
    assert result.stderr.splitlines()[-1] == message
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "none.jsonl"], "error: --input none.jsonl: no such file"),
        (["--input", "none*.jsonl"], "error: --input none*.jsonl: matches no file"),
        (["--inputs", "a"], "unknown flag --inputs"),
        (
            ["--input", "-", "--json-keys", "a", "a"],
            "--json-keys a a: must hold at least one key, and no key twice",
        ),
        (["--input", "-", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--input", "-", "--resume"], "--resume: requires files as --input; standard input"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, tokenizer_flags: Any, flags: Any, message: Any) -> None:
    result = run(*flags, "--output-prefix", tmp_path / "c", *tokenizer_flags, input="")
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "flags", "found"),
    [
        ("", [], "empty documents: 0, rejected lines: 0"),
        ('{"text": ""}\n' * 2, [], "empty documents: 2, rejected lines: 0"),
        ('{"text": ""}\n' * 2, ["--skip-empty"], "empty documents: 2, rejected lines: 0"),
        ("oops\n", ["--on-error", "skip"], "empty documents: 0, rejected lines: 1"),
    ],
)
def test_input_without_text_makes_no_dataset(
    tmp_path: Path, tokenizer_flags: Any, content: Any, flags: Any, found: Any
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    result = run(
        "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "c", *tokenizer_flags, *flags
    )
    assert result.returncode == 2
    assert f"in.jsonl: holds no text ({found}); no dataset is made" in result.stderr
    assert left_behind(tmp_path) == ["in.jsonl"]


def test_a_quarantine_is_not_read_and_removed_by_the_same_prefix(
    tmp_path: Path, tokenizer_flags: Any
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\noops\n')
    quarantine = [*tokenizer_flags, "--on-error", "quarantine", "--output-prefix", tmp_path / "c"]
    assert run("--input", tmp_path / "in.jsonl", *quarantine).returncode == 0
    result = run("--input", tmp_path / "c_quarantined.jsonl", *quarantine)
    assert result.returncode == 2
    assert f"--output-prefix {tmp_path}/c would overwrite this file; give another prefix" in result.stderr
    assert (tmp_path / "c_quarantined.jsonl").read_text() == "oops\n"


def test_help_shows_an_example_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "python tools/preprocess_data.py --input corpus.jsonl" in " ".join(result.stdout.split())
    assert "Exit codes: 0 success" in " ".join(result.stdout.replace("│", "").split())
