#!/usr/bin/env python3
"""Measures speed and memory of preprocessing, compared with Megatron-LM's documented loop and tool.

    python benchmarks/data.py                   measures speed on CPython's documentation and sources, repeated
    python benchmarks/data.py --memory-gb 2     measures also the peak memory, on a generated input of that size

Every round runs each variant once, in turn, so that changes in the machine's speed affect all of them; the table shows
medians over the rounds. Our tool is timed as a user runs it: the whole command, from the start of Python to the
manifest with its checksums. The loop follows Megatron-LM's public description (read a line, `json.loads`, tokenize,
`builder.add_item`, `builder.end_document`) and is timed without its imports. It uses mcore's builder and the tokenizer
of our tool, a byte-level BPE of 32k tokens. `peers/pool_tool.py` stands for Megatron-LM's tool: it follows the
documented algorithm with megatron-core's tokenizer and builder and a pool of workers, and is timed like ours as a whole
command. The outputs are compared byte for byte.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main

ROOT = Path(__file__).resolve().parents[1]
_LOOP = "Megatron-LM's loop, 1 process"
_POOL = "Megatron-LM's algorithm, pool"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the size of the benchmark."""

    repeat: int = 4
    """Copies of the corpus (about 13 MB each) in the input."""

    rounds: int = 3
    """Number of timed rounds; each runs every variant once."""

    vocab_size: int = 32768
    """Vocabulary size of the tokenizer, which is trained on the corpus."""

    memory_gb: float | None = None
    """Also measure peak memory, on a generated input of this many GB without repetition."""

    pair_only: bool = False
    """Measure only two commands, on all cores: the tool with a pool of workers, and our tool with gigatoken."""

    skip_speed: bool = False
    """Measure only memory."""


@dataclass
class Files:
    """Paths of the benchmark's files, and the commands that read and write them."""

    directory: Path

    def __post_init__(self) -> None:
        self.corpus, self.repeated = self.directory / "corpus.jsonl", self.directory / "repeated.jsonl"
        self.tokenizer = self.directory / "tokenizer"

    def tool(self, name: str, *arguments: object) -> list[str]:
        """Returns the command line of one of our tools."""
        return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]

    def preprocess(self, source: Path, output: str, *more: object) -> list[str]:
        """Returns the command line that preprocesses a file."""
        vocab, merges = self.tokenizer / "vocab.json", self.tokenizer / "merges.txt"
        return self.tool(
            "preprocess_data.py", "--input", source, "--output-prefix", self.directory / output, "--append-eod",
            "--vocab-file", vocab, "--merge-file", merges, *more,
        )  # fmt: skip


def prepare(files: Files, config: BenchmarkConfig) -> None:
    """Builds the corpus, a file with several copies of it, and the tokenizer."""
    held_out = files.directory / "held_out.jsonl"
    _quiet(files.tool("build_corpus.py", "--output", files.corpus, "--held-out", held_out))
    size = ("--vocab-size", config.vocab_size)
    _quiet(files.tool("train_tokenizer.py", "--input", files.corpus, "--output-dir", files.tokenizer, *size))
    files.repeated.write_bytes(files.corpus.read_bytes() * config.repeat)


def _quiet(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@dataclass(frozen=True)
class Timing:
    """Wall time of one run, and CPU time of all its processes; other load on the machine affects CPU time less."""

    seconds: float
    cpu_seconds: float


def megatron_loop(files: Files) -> Timing:
    """Runs Megatron-LM's loop as its documentation describes it; imports and loading are not timed."""
    import tokenizers
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer / "tokenizer.json"))
    eod = tokenizer.token_to_id("<|endoftext|>")
    prefix = files.directory / "loop"
    begin, cpu = time.perf_counter(), time.process_time()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size()))
    with open(files.repeated, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            builder.add_item(torch.IntTensor([*ids, eod]))
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Timing(time.perf_counter() - begin, time.process_time() - cpu)


def ours(files: Files, encoder: str, workers: int) -> Callable[[], Timing]:
    """Returns a function that runs and times our tool once, and compares its output with the others'."""

    def timed() -> Timing:
        begin, cpu = time.perf_counter(), _children_cpu()
        _quiet(files.preprocess(files.repeated, "ours", "--encoder", encoder, "--workers", workers))
        timing = Timing(time.perf_counter() - begin, _children_cpu() - cpu)
        _require_equal(files)
        return timing

    return timed


def pool_tool(files: Files, workers: int) -> Callable[[], Timing]:
    """Returns a function that runs and times the tool with a pool once."""

    def timed() -> Timing:
        arguments = [files.repeated, files.directory / "pool", files.tokenizer, workers]
        begin, cpu = time.perf_counter(), _children_cpu()
        _quiet([sys.executable, str(ROOT / "benchmarks" / "peers" / "pool_tool.py"), *map(str, arguments)])
        return Timing(time.perf_counter() - begin, _children_cpu() - cpu)

    return timed


def _require_equal(files: Files) -> None:
    for suffix in ("bin", "idx"):
        mine = files.directory / f"ours_text_document.{suffix}"
        for theirs in (files.directory / f"{name}.{suffix}" for name in ("loop", "pool")):
            if theirs.exists() and mine.read_bytes() != theirs.read_bytes():
                raise ValueError(f"{mine} differs from {theirs}")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # children that have ended, and their children
    return usage.ru_utime + usage.ru_stime


def measure_speed(files: Files, config: BenchmarkConfig, console: Console) -> None:
    """Prints the table of speeds; the ratios compare each variant with the first one."""
    cores = len(os.sched_getaffinity(0))
    pool, fastest = f"{_POOL}, workers {cores}", f"ours, gigatoken, workers {cores}"
    variants: dict[str, Callable[[], Timing]] = {pool: pool_tool(files, cores)}
    if config.pair_only:
        variants[fastest] = ours(files, "gigatoken", cores)
    else:
        variants = {_LOOP: lambda: megatron_loop(files), **variants}
        for encoder in ("reference", "gigatoken"):
            for workers in sorted({1, cores}):
                variants[f"ours, {encoder}, workers {workers}"] = ours(files, encoder, workers)
    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    for _ in range(config.rounds):
        for name, run in variants.items():
            timings[name].append(run())
    _print_table(files, timings, console)
    _print_pair(console, timings[pool], timings[fastest])
    for encoder in ("reference", "gigatoken") if cores > 1 and not config.pair_only else ():
        one_worker, all_workers = (timings[f"ours, {encoder}, workers {n}"] for n in (1, cores))
        pairs = zip(one_worker, all_workers, strict=True)
        scaling = statistics.median(one.seconds / many.seconds for one, many in pairs)
        console.print(f"{encoder}: 1 to {cores} workers is {scaling:.2f} times as fast")


def _print_table(files: Files, timings: dict[str, list[Timing]], console: Console) -> None:
    megabytes = files.repeated.stat().st_size / 1e6
    tokens = (files.directory / "ours_text_document.bin").stat().st_size / 2
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"{megabytes:.0f} MB of JSON lines, {tokens / 1e6:.1f} million tokens, {cores} cores")
    for column in (
        "variant",
        "seconds",
        "MB/s",
        "million tokens/s",
        "times as fast",
        "lowest .. highest",
        "CPU seconds",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    first = next(iter(timings.values()))
    for name, times in timings.items():
        median = statistics.median(timing.seconds for timing in times)
        ratios = [theirs.seconds / mine.seconds for theirs, mine in zip(first, times, strict=True)]
        cpu = statistics.median(timing.cpu_seconds for timing in times)
        table.add_row(
            name, f"{median:.2f}", f"{megabytes / median:.1f}", f"{tokens / median / 1e6:.2f}",
            f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f} .. {max(ratios):.1f}", f"{cpu:.2f}",
        )  # fmt: skip
    console.print(table)


def _print_pair(console: Console, theirs: list[Timing], mine: list[Timing]) -> None:
    """Prints how much less time our tool takes than the tool with a pool, both as whole commands."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    for name, field in (("wall time", "seconds"), ("processor time", "cpu_seconds")):
        pairs = zip(theirs, mine, strict=True)
        ratios = [getattr(their, field) / getattr(our, field) for their, our in pairs]
        console.print(
            f"{_POOL} : ours, whole commands, {name}: {statistics.median(ratios):.1f} times "
            f"({min(ratios):.1f} .. {max(ratios):.1f}; load of the machine {load})"
        )


def generate(path: Path, size: int) -> None:
    """Writes JSON lines of random words, in documents of 20 B to 200 kB."""
    # Words hardly repeat, so that no tokenizer can serve them from its cache.
    rng = random.Random(1)
    with open(path, "w", encoding="ascii") as file:
        while file.tell() < size:
            letters = rng.randbytes(int(20 * 10 ** rng.uniform(0, 4)) // 2).hex()
            letters = letters.translate(str.maketrans("0123456789", " etao insr"))
            file.write(json.dumps({"text": letters}) + "\n")


def measure_memory(files: Files, config: BenchmarkConfig, console: Console) -> None:
    """Prints the highest sum of resident memory of the tool and its workers."""
    assert config.memory_gb is not None
    path = files.directory / "generated.jsonl"
    generate(path, int(config.memory_gb * 1e9))
    table = Table(title=f"peak memory, {path.stat().st_size / 1e9:.2f} GB of generated text")
    for column in ("variant", "seconds", "peak of all processes together, MB", "highest of one process, MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    cores = len(os.sched_getaffinity(0))
    for encoder in ("gigatoken", "reference"):
        begin = time.perf_counter()
        options = ("--encoder", encoder, "--workers", cores)
        total, single = _peak_memory(files.preprocess(path, "generated", *options))
        seconds = time.perf_counter() - begin
        table.add_row(f"ours, {encoder}, workers {cores}", f"{seconds:.1f}", f"{total:.0f}", f"{single:.0f}")
    console.print(table)


def _peak_memory(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns the peak resident memory of all its processes together and of one of them, in MB."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = single = 0.0
    while process.poll() is None:
        sizes = []
        for member in [process, *_children(process)]:
            try:
                sizes.append(member.memory_info().rss / 1e6)
            except psutil.Error:
                continue
        total, single = max(total, sum(sizes)), max(single, *sizes, 0.0)
        time.sleep(0.05)
    if process.returncode != 0:
        raise ValueError(f"{' '.join(command)}: failed with exit code {process.returncode}")
    return total, single


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    """Parses the flags and prints the tables."""
    config = parse(BenchmarkConfig, prog="benchmarks/data.py", description=str(__doc__))
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as directory:
        files = Files(Path(directory))
        prepare(files, config)
        if not config.skip_speed:
            measure_speed(files, config, console)
        if config.memory_gb is not None:
            measure_memory(files, config, console)


if __name__ == "__main__":
    run_main(main)
