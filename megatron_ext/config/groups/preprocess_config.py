"""Input of the data tools (`InputConfig`) and output of `tools/preprocess_data.py` (`PreprocessConfig`)."""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import check_at_least, check_choices

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Files of raw text, and how documents are read from them."""

    input: tuple[str, ...]
    """Files, glob patterns, or - for standard input: .txt, .parquet, .arrow, else JSON lines; may be compressed (.gz,
    .zst, .bz2, .xz)."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of a JSON line (columns of a .parquet or .arrow file) that hold text; each gives a dataset of its own."""

    text_unit: Literal["line", "file"] = "line"
    """Document in a .txt file: each line that is not blank, or the whole file."""

    max_line_bytes: int = 256_000_000
    """Largest size of a line (or of a whole-file document) in bytes; a longer one is an error."""

    max_documents: int | None = None
    """Stop after this many documents, for a trial run."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "max_line_bytes", "max_documents")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ValueError(f"--json-keys {' '.join(self.json_keys)}: give at least one key, and none twice")
        bad = [key for key in self.json_keys if "/" in key or not key]
        if bad:
            raise ValueError(f"--json-keys {bad[0]!r}: a key becomes part of a file name and cannot hold /")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How documents become `PREFIX_KEY_document.bin` and `.idx`."""

    output_prefix: str
    """Path of the datasets without `_KEY_document.bin`; missing directories are created."""

    append_eod: bool = False
    """Append the end-of-document token to every non-empty document."""

    prepend_bos: bool = False
    """Prepend the tokenizer's begin-of-text token to every non-empty document."""

    workers: int | None = None
    """Number of worker processes. Default: one per core that this process may use."""

    partitions: int = 1
    """Distribute the documents round-robin over N parts and concatenate these, as Megatron-LM does."""

    keep_sequential_samples: bool = False
    """With --partitions above 1: keep the order of the input."""

    on_error: OnError = "fail"
    """On a line that is not a document: stop, skip it, or skip it and keep it in PREFIX_quarantined.jsonl."""

    skip_empty: bool = False
    """Skip documents that have no token under any key. Default: they keep their place in the index."""

    encoder: Literal["auto", "gigatoken", "reference"] = "auto"
    """Tokenizer implementation; auto uses gigatoken if its ids equal the reference's on a sample of the input."""

    resume: bool = False
    """Continue from the finished pieces of a run that was killed."""

    log_interval: int = 1000
    """Documents between two progress lines if the output is not a terminal; at most one line per second."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "workers", "partitions", "log_interval")
        if self.keep_sequential_samples and self.partitions == 1:
            raise ValueError("--keep-sequential-samples: requires --partitions above 1 (got 1)")
        if os.path.basename(self.output_prefix) == "":
            raise ValueError(f"--output-prefix {self.output_prefix!r}: requires a name after the directory")
