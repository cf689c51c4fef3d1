"""Write a JSON-lines corpus of real text that every machine has: CPython's documentation and standard library."""

from dataclasses import dataclass

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.data.corpora.python_corpus import write_corpus


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Size and place of the corpus."""

    output: str
    """Training file to write: JSON lines of {"text": ...}."""

    held_out: str
    """Held-out file to write; its modules and topics are not in the training file."""

    max_bytes: int | None = None
    """Bytes of text in both files: documentation first, then docstrings, then sources. Default: all."""

    held_out_fraction: float = 0.05
    """Fraction of the modules and topics in the held-out file."""

    repeat: int = 1
    """Write the training documents this many times, to make a large input."""


def main() -> None:
    """Writes both files and prints their sizes."""
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
