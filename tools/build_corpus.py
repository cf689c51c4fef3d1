"""Write a JSON-lines corpus of text that every machine with Python has: CPython's documentation and library sources."""

from dataclasses import dataclass

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.data.corpora.python_corpus import write_corpus


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Flags for the size of the corpus and the files to write."""

    output: str
    """Training file to write: JSON lines of the form {"text": ...}."""

    held_out: str
    """Held-out file to write; its modules and topics do not occur in the training file."""

    max_bytes: int | None = None
    """Write at most this many bytes of text to both files together; documentation is taken first, then docstrings,
    then sources. Default: take all text.
    """

    held_out_fraction: float = 0.05
    """Fraction of the modules and topics that is written to the held-out file."""

    repeat: int = 1
    """Write the training documents this many times, to make a large input file."""


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
