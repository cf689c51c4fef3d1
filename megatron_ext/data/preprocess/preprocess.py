"""Turns raw text into indexed datasets, `PREFIX_KEY_document.bin` and `.idx`, each with a manifest.

With `--split-sentences` a dataset is called `PREFIX_KEY_sentence`, and a document has one sequence per sentence.

The parent process reads only streams (compressed files and pipes). Workers read byte ranges of all other files,
tokenize them and write shards (`shards.py`). The shards are appended in order (`scheduler.py`, `assembly.py`); the
finished datasets get a manifest (`manifest.py`) and their final names (`work_directory.py`). The datasets do not
depend on the number of workers, and are byte for byte equal to those of mcore's `IndexedDatasetBuilder`.
"""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.preprocess_config import InputConfig, PreprocessConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.indexed.indexed_files import bin_path, idx_path, optimal_dtype
from megatron_ext.data.indexed.manifest import PREPENDED_BOS, manifest_path, write_manifest
from megatron_ext.data.preprocess.assembly import Assembly, load_state
from megatron_ext.data.preprocess.encoding import Choice, choose_encoder
from megatron_ext.data.preprocess.preprocess_progress import ProgressDisplay
from megatron_ext.data.preprocess.scheduler import LongLines, Scheduler, WorkerSettings
from megatron_ext.data.preprocess.sentences import Splitting, splitter_of
from megatron_ext.data.preprocess.shards import ShardInfo, ShardOptions
from megatron_ext.data.preprocess.work_directory import WorkDirectory
from megatron_ext.data.readers import Chunk, expand_inputs, plan_chunks, read_chunk
from megatron_ext.data.readers.sources import chunk_size
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer

TOOL = "tools/preprocess_data.py"
_SAMPLED_CHUNKS = 8
_SAMPLED_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class Summary:
    """The result of a preprocessing run.

    Attributes:
        prefixes: prefixes of the datasets, one for each key.
        choice: the encoder and the reason for choosing it; None if a resumed run only had to publish the datasets.
        totals: counts over all documents.
        seconds: wall-clock time of the run.
        resumed_shards: number of shards that a killed run had finished and this run reused.
        message: a note to show to the user, or None.
    """

    prefixes: list[str]
    choice: Choice | None
    totals: ShardInfo
    seconds: float
    resumed_shards: int
    message: str | None


def dataset_prefix(output_prefix: str, key: str, *, split_sentences: bool = False) -> str:
    """Returns the prefix of the dataset of one key, named as Megatron-LM names it."""
    return f"{output_prefix}_{key}_{'sentence' if split_sentences else 'document'}"


def rejected_path(output_prefix: str) -> str:
    """Returns the path of the report on rejected lines: JSON lines with file, line, byte offset and reason."""
    return f"{output_prefix}_rejected.jsonl"


def quarantined_path(output_prefix: str) -> str:
    """Returns the path of the file that holds the rejected lines themselves (`--on-error quarantine`)."""
    return f"{output_prefix}_quarantined.jsonl"


class Preprocessor:
    """One run of `tools/preprocess_data.py`.

    Args:
        inputs: the input files and how to read them.
        tokenizer_config: the tokenizer.
        config: how to write the datasets.

    Raises:
        ValueError, OSError: a flag or a file cannot be used; the message is one line for the user.
    """

    def __init__(
        self, inputs: InputConfig, tokenizer_config: TokenizerConfig, config: PreprocessConfig
    ) -> None:
        self.inputs, self.tokenizer_config, self.config = inputs, tokenizer_config, config
        self.sources = expand_inputs(inputs)
        if config.resume and any(source.size() is None for source in self.sources):
            raise ValueError(
                "--resume: requires files as --input; standard input or a pipe cannot be read again"
            )
        self.tokenizer: Tokenizer = build_tokenizer(tokenizer_config)
        if config.prepend_bos and self.tokenizer.bos is None:
            raise ValueError("--prepend-bos: the tokenizer's files define no begin-of-text token (bos_token)")
        if config.prepend_bos and self.tokenizer.bos in self.tokenizer.text_frame[0]:
            raise ValueError(
                "--prepend-bos: --legacy-tokenizer or --tokenizer-hf-include-special-tokens already "
                "puts the begin-of-text token before every text; give only one of these flags"
            )
        self.splitting = Splitting(config.lang, config.keep_newlines) if config.split_sentences else None
        splitter_of(
            self.splitting
        )  # loads the model before workers are forked; raises an error if there is none
        self.chunk_bytes = chunk_size(self.sources)
        self.prefixes = [
            dataset_prefix(config.output_prefix, key, split_sentences=config.split_sentences)
            for key in inputs.json_keys
        ]
        self._refuse_own_output()
        self.choice: Choice | None = None
        self.resumed_shards = 0

    def run(self) -> Summary:
        """Makes the datasets.

        Raises:
            ValueError, OSError: the input has an error or the disk is full; all files of the run are removed.
            WorkerDied, WorkerBug, KeyboardInterrupt: the run was interrupted; `--resume` can use its finished shards.
        """
        begin = time.monotonic()
        work = WorkDirectory(self.config.output_prefix, self._plan(), resume=self.config.resume)
        try:
            if not work.is_publishing:
                self._tokenize(work)
            totals = load_state(work.path, len(self.prefixes)).totals
            work.publish()
            work.remove()
        except (ValueError, OSError) as error:
            work.remove()
            if (
                isinstance(error, OSError) and error.strerror and error.filename is None
            ):  # numpy's error for a failed write (disk full)
                message = f"{error.strerror} (temporary files are removed)"
                raise OSError(error.errno, message, self.config.output_prefix) from None
            raise
        finally:
            work.release()
        seconds = time.monotonic() - begin
        return Summary(self.prefixes, self.choice, totals, seconds, self.resumed_shards, self._message())

    def _message(self) -> str | None:
        if self._first_token() is not None or not self.tokenizer.adds_bos or self.tokenizer.bos is None:
            return None
        bos = self.tokenizer.inv_vocab[self.tokenizer.bos]
        remedy = "--prepend-bos adds it"
        if self.tokenizer_config.tokenizer_type == "HuggingFaceTokenizer":
            remedy += "; Megatron-LM adds it by default, as --tokenizer-hf-include-special-tokens does here"
        return f"the tokenizer's own configuration puts {bos} before a text, but these documents have none ({remedy})"

    def _first_token(self) -> int | None:
        """Returns the token that every document of the datasets begins with, if there is one."""
        before, _ = self.tokenizer.text_frame
        return self.tokenizer.bos if self.config.prepend_bos else before[0] if before else None

    def _refuse_own_output(self) -> None:
        """Refuses an input file that this run would itself remove or replace when it publishes its datasets."""
        prefix = self.config.output_prefix
        written = [rejected_path(prefix), quarantined_path(prefix)]
        written += [
            name(dataset) for dataset in self.prefixes for name in (bin_path, idx_path, manifest_path)
        ]
        for path in filter(os.path.exists, written):
            for source in self.sources:
                if source.path != "-" and os.path.samefile(source.path, path):
                    raise ValueError(
                        f"--input {source.path}: --output-prefix {prefix} would overwrite this file; give another "
                        "prefix"
                    )

    def _plan(self) -> dict[str, Any]:
        """Returns the inputs and settings that determine the datasets; `--resume` requires those of the killed run."""
        inputs = asdict(self.inputs)
        inputs.pop("input")
        files = []
        for source in self.sources:
            is_file = source.size() is not None
            status = os.stat(source.path) if is_file else None
            files.append([source.path, status.st_size, status.st_mtime_ns] if status else [source.path])
        config = self.config
        return {
            **{flag_name(name): value for name, value in inputs.items()},
            "input (path, size, time)": files,
            "tokenizer": self.tokenizer.fingerprint(),
            "chunk_bytes": self.chunk_bytes,
            "splitting": None if self.splitting is None else asdict(self.splitting),
            "text_frame": list(self.tokenizer.text_frame),
            "--append-eod": config.append_eod,
            "--prepend-bos": config.prepend_bos,
            "--partitions": config.partitions,
            "--keep-sequential-samples": config.keep_sequential_samples,
            "--on-error": config.on_error,
            "--skip-empty": config.skip_empty,
        }

    def _options(self, work: WorkDirectory) -> ShardOptions:
        return ShardOptions(
            directory=str(work.path),
            keys=self.inputs.json_keys,
            dtype=np.dtype(optimal_dtype(self.tokenizer.vocab_size)).name,
            vocab_size=self.tokenizer.vocab_size,
            eod=self.tokenizer.eod if self.config.append_eod else None,
            bos=self.tokenizer.bos if self.config.prepend_bos else None,
            on_error=self.config.on_error,
            skip_empty=self.config.skip_empty,
            max_line_bytes=self.inputs.max_line_bytes,
            splitting=self.splitting,
        )

    def _tokenize(self, work: WorkDirectory) -> None:
        config, inputs = self.config, self.inputs
        partitions = 1 if config.keep_sequential_samples else config.partitions
        options = self._options(work)
        assembly = Assembly(work.path, len(self.prefixes), partitions, self.sources)
        long_lines = LongLines(options)
        keep = long_lines.write if config.on_error == "quarantine" else None
        chunks = plan_chunks(self.sources, self.chunk_bytes, inputs.max_line_bytes, keep)
        first = list(itertools.islice(chunks, 1))
        encoder, self.choice = choose_encoder(self.tokenizer, config.encoder, self._sample(first))
        scheduler = Scheduler(
            itertools.chain(first, chunks), assembly, options, long_lines, inputs.max_documents
        )
        workers = config.workers or available_cores()
        sizes = [source.size() for source in self.sources]
        total = (
            sum(size or 0 for size in sizes) if None not in sizes and inputs.max_documents is None else None
        )
        settings = WorkerSettings(self.tokenizer_config, self.choice.encoder, options, encoder)
        display = ProgressDisplay(total, config.log_interval)
        scheduler.run(settings, 1 if inputs.max_documents else workers, display, work.lock)
        self.resumed_shards = scheduler.resumed_shards
        self._require_text(assembly.state.totals)
        unpublished = assembly.finish(options.dtype)
        for prefix in unpublished:
            write_manifest(
                prefix,
                tool=TOOL,
                tokenizer=self._description(),
                inputs=[source.path for source in self.sources],
                extra=self._manifest_extra(assembly.state.totals),
            )
        moves, stale = self._moves(work, assembly, unpublished)
        work.prepare(moves, stale)

    def _description(self) -> dict[str, object]:
        """Describes the tokenizer for the manifest, together with the token put before every document, if any."""
        first = self._first_token()
        begun = {} if first is None else {PREPENDED_BOS: first}
        return self.tokenizer.describe() | begun

    def _require_text(self, totals: ShardInfo) -> None:
        if any(totals.tokens):
            return
        raise ValueError(
            f"--input {' '.join(self.inputs.input)}: holds no text (empty documents:"
            f" {totals.documents + totals.skipped_empty:,}, rejected lines: {totals.rejected:,});"
            f" no dataset is made"
        )

    def _moves(
        self, work: WorkDirectory, assembly: Assembly, unpublished: list[str]
    ) -> tuple[list[tuple[Any, str]], list[str]]:
        """Returns the renames that publish the datasets (indices last), and the older files to remove before the
        renames.
        """
        prefix = self.config.output_prefix
        reports = [
            (Assembly.REJECTED, rejected_path(prefix)),
            (Assembly.QUARANTINED, quarantined_path(prefix)),
        ]
        moves = [(work.path / name, path) for name, path in reports if assembly.state.sizes[name]]
        stale = [path for name, path in reports if not assembly.state.sizes[name]]
        stale += [name(dataset) for dataset in self.prefixes for name in (idx_path, manifest_path)]
        for name in (bin_path, manifest_path, idx_path):
            datasets = zip(unpublished, self.prefixes, strict=True)
            moves += [(Path(name(source)), name(target)) for source, target in datasets]
        return moves, stale

    def _manifest_extra(self, totals: ShardInfo) -> dict[str, Any]:
        return {
            "options": {
                **({} if self.splitting is None else {"split_sentences": asdict(self.splitting)}),
                "json_keys": list(self.inputs.json_keys),
                "append_eod": self.config.append_eod,
                "prepend_bos": self.config.prepend_bos,
                "partitions": self.config.partitions,
                "keep_sequential_samples": self.config.keep_sequential_samples,
                "on_error": self.config.on_error,
                "skip_empty": self.config.skip_empty,
                "max_documents": self.inputs.max_documents,
            },
            "rejected_lines": totals.rejected,
            "blank_lines": totals.blank,
            "skipped_empty": totals.skipped_empty,
        }

    def _sample(self, first: list[Chunk]) -> list[str]:
        """Returns documents from the first chunk and from chunks spread over the input, to compare encoders."""
        plain = [source for source in self.sources if not source.is_stream]
        packed = [source for source in self.sources if source.is_stream and source.size() is not None]
        spread = _evenly(list(plan_chunks(plain, self.chunk_bytes, self.inputs.max_line_bytes)))
        for source in _evenly(packed):
            spread += itertools.islice(plan_chunks([source], self.chunk_bytes, self.inputs.max_line_bytes), 1)
        return [text for chunk in [*first, *spread] for text in self._sample_chunk(chunk)]

    def _sample_chunk(self, chunk: Chunk) -> Iterator[str]:
        left = _SAMPLED_CHARACTERS
        for batch in itertools.islice(
            read_chunk(chunk, self.inputs.json_keys, self.inputs.max_line_bytes), 1
        ):
            for whole in itertools.chain.from_iterable(zip(*batch.texts, strict=True)):
                text = whole if isinstance(whole, str) else " ".join(whole)
                if left <= 0:
                    return
                yield text[:left]
                left -= len(text)


def available_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _evenly(items: list[Any]) -> list[Any]:
    """Returns at most `_SAMPLED_CHUNKS` of the items, spread evenly."""
    step = max(len(items) / _SAMPLED_CHUNKS, 1)
    return [items[int(i * step)] for i in range(min(len(items), _SAMPLED_CHUNKS))]
