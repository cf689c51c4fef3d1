"""What the data tools read (`InputConfig`) and how `tools/preprocess_data.py` writes (`PreprocessConfig`)."""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import check_at_least, check_choices

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Raw text: files, and what to do with a line that is not a document."""

    input: tuple[str, ...]
    """Files, patterns, - for standard input: .txt, .parquet, .arrow, else JSON lines; .gz .zst .bz2 .xz on top."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of a JSON line (columns of a .parquet or .arrow file) that hold text; each makes its own dataset."""

    text_unit: Literal["line", "file"] = "line"
    """What a document is in a .txt file: every line that is not blank, or the whole file."""

    max_line_bytes: int = 256_000_000
    """A longer line (or whole-file document) is an error."""

    max_documents: int | None = None
    """Stop after this many documents, for a trial run."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "max_line_bytes", "max_documents")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ValueError(f"--json-keys {' '.join(self.json_keys)}: needs different keys, at least one")
        bad = [key for key in self.json_keys if "/" in key or not key]
        if bad:
            raise ValueError(f"--json-keys {bad[0]!r}: a key becomes part of a file name and cannot hold /")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How documents become `PREFIX_KEY_document.bin` and `.idx`."""

    output_prefix: str
    """Path of the datasets without `_KEY_document.bin`; missing directories are made."""

    append_eod: bool = False
    """End every document that is not empty with the end-of-document token."""

    prepend_bos: bool = False
    """Begin every document that is not empty with the tokenizer's begin-of-text token."""

    workers: int | None = None
    """Worker processes. Default: every core this process may use."""

    partitions: int = 1
    """With N above 1, documents are dealt in turn to N parts that follow each other, which is Megatron-LM's order."""

    keep_sequential_samples: bool = False
    """Keep the order of the input where --partitions is above 1."""

    on_error: OnError = "fail"
    """A line that is not a document: stop, leave it out, or leave it out and keep it in PREFIX_quarantined.jsonl."""

    skip_empty: bool = False
    """Leave out documents without a token (under every key); by default they keep their place in the index."""

    encoder: Literal["auto", "gigatoken", "reference"] = "auto"
    """Who tokenizes: gigatoken where its ids equal the reference's on a sample of the input, or the reference."""

    resume: bool = False
    """Go on from the finished pieces of a run that was killed."""

    log_interval: int = 1000
    """Documents between two progress lines where the output is not a terminal; at most one line a second."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "workers", "partitions", "log_interval")
        if self.keep_sequential_samples and self.partitions == 1:
            raise ValueError("--keep-sequential-samples: says something only with --partitions above 1")
        if os.path.basename(self.output_prefix) == "":
            raise ValueError(f"--output-prefix {self.output_prefix!r}: needs a name after the directory")
