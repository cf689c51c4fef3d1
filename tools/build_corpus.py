"""Write a JSON-lines corpus of real text that is on every machine: CPython's documentation and standard library."""

from dataclasses import dataclass

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.data.corpora.python_corpus import write_corpus


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to write."""

    output: str
    """Training file, JSON lines of {"text": ...}."""

    held_out: str
    """Held-out file, from other modules and topics than the training file."""

    max_bytes: int | None = None
    """Bytes of text to take, both files together: documentation first, then docstrings, then sources. Default: all."""

    held_out_fraction: float = 0.05
    """Share of the modules and topics that goes to the held-out file."""

    repeat: int = 1
    """Write the training documents this many times over, to make large inputs."""


def main() -> None:
    """Parse the flags, write both files, print what they hold."""
    config = parse(
        CorpusConfig,
        prog="tools/build_corpus.py",
        description=str(__doc__),
        example="python tools/build_corpus.py --output data/train.jsonl --held-out data/held_out.jsonl",
    )
    counts = write_corpus(
        config.output,
        config.held_out,
        max_bytes=config.max_bytes,
        held_out_fraction=config.held_out_fraction,
        repeat=config.repeat,
    )
    for path, count in zip((config.output, config.held_out), counts, strict=True):
        print(f"{path}: {count.documents:,} documents, {count.text_bytes:,} bytes of text")


if __name__ == "__main__":
    run_main(main)
