"""Flags for the input of the data tools (`InputConfig`) and the output of `tools/preprocess_data.py`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, check_choices, flag_name

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Flags for the files of raw text, and how documents are read from them."""

    input: tuple[str, ...]
    """Input files or glob patterns, or - for standard input. Files other than .txt, .parquet and .arrow are read as
    JSON lines, unless --text-unit is given; files may be compressed (.gz, .zst, .bz2, .xz).
    """

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON lines (or columns of .parquet and .arrow files) that hold text; each key gives one dataset."""

    text_unit: Literal["line", "file"] | None = None
    """Document boundaries in plain text: every non-blank line is a document (line), or the whole file is (file). If
    given, every input except .jsonl, .json, .parquet, .arrow and standard input is read as plain text. Default: line,
    for .txt only.
    """

    max_line_bytes: int = 256_000_000
    """Largest allowed size in bytes of a line, or of a file read as one document; a larger size is an error."""

    max_documents: int | None = None
    """Stop after this many documents, for a trial run."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "max_line_bytes", "max_documents")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ValueError(
                f"--json-keys {' '.join(self.json_keys)}: must hold at least one key, and no key twice"
            )
        bad = [key for key in self.json_keys if "/" in key or not key]
        if bad:
            raise ValueError(
                f"--json-keys {bad[0]!r}: a key becomes part of a file name and must not contain /"
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Flags for how documents are tokenized and written to `PREFIX_KEY_document.bin` and `.idx`."""

    output_prefix: str
    """Path of the output datasets, without `_KEY_document.bin`; missing directories are created."""

    split_sentences: Switch = False
    """Split documents into sentences and store each sentence as a sequence, in PREFIX_KEY_sentence.bin and .idx."""

    keep_newlines: Switch = False
    """With --split-sentences: keep the white space between sentences, at the end of each sentence."""

    lang: str = "english"
    """With --split-sentences: language of the Punkt model that splits the text."""

    append_eod: bool = False
    """Append the end-of-document token to every non-empty document."""

    prepend_bos: bool = False
    """Prepend the tokenizer's begin-of-text token to every non-empty document."""

    workers: int | None = None
    """Number of worker processes. Default: one per core that this process may use."""

    partitions: int = 1
    """Distribute the documents round-robin over this many parts and concatenate the parts, as Megatron-LM does."""

    keep_sequential_samples: bool = False
    """Keep the documents in the order of the input, whatever --partitions is."""

    on_error: OnError = "fail"
    """Action for a line that is not a valid document: stop with an error (fail), skip the line (skip), or skip it and
    write it to PREFIX_quarantined.jsonl (quarantine).
    """

    skip_empty: bool = False
    """Skip documents that have no tokens under any key. Default: keep them as empty documents."""

    encoder: Literal["auto", "gigatoken", "reference"] = "auto"
    """Library that encodes: gigatoken (fast) or the tokenizer's own (reference). auto uses gigatoken if both give the
    same token ids for a sample of the input.
    """

    resume: bool = False
    """Continue an earlier run that was killed, and reuse the pieces it has finished."""

    log_interval: int = 1000
    """Documents between two progress lines if the output is not a terminal (at most one line per second is printed)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "workers", "partitions", "log_interval")
        if not self.lang.isidentifier():
            raise ValueError(f"--lang {self.lang!r}: must be the name of a language, such as english")
        if os.path.basename(self.output_prefix) == "":
            raise ValueError(f"--output-prefix {self.output_prefix!r}: requires a name after the directory")

    def without_effect(self) -> Iterator[str]:
        """Yields each given flag that has no effect, with the reason."""
        if not self.split_sentences:
            given = {"--keep-newlines": self.keep_newlines, f"--lang {self.lang}": self.lang != "english"}
            yield from (
                f"{flag} (requires --split-sentences)" for flag, is_given in given.items() if is_given
            )


@dataclass(frozen=True, kw_only=True)
class IgnoredConfig:
    """Flags of Megatron-LM's tool that have no effect here; the tool prints one line that names the given ones."""

    tokenizer_hf_use_fast: Switch = False
    """No effect: Hugging Face tokenizers are always the fast ones."""

    tokenizer_hf_no_use_fast: Switch = False
    """No effect: Hugging Face tokenizers are always the fast ones."""

    tokenizer_hf_no_include_special_tokens: Switch = False
    """No effect: texts get no special tokens without --tokenizer-hf-include-special-tokens."""

    trust_remote_code: Switch = False
    """No effect: a tokenizer's own code is never executed."""

    vocab_extra_ids: int | None = None
    """No effect, as in Megatron-LM's tool: the ids are for T5."""

    find_optimal_num_workers: Switch = False
    """No effect: there is one worker per core unless --workers is given."""

    workers_to_check: tuple[int, ...] = ()
    """No effect: there is one worker per core unless --workers is given."""

    performance_dir: str | None = None
    """No effect: the summary shows the speed."""

    def without_effect(self) -> Iterator[str]:
        """Yields each flag of this group that was given; none of them has an effect."""
        for field in fields(self):
            if getattr(self, field.name) != field.default:
                yield flag_name(field.name)
