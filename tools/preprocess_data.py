"""Tokenize raw text into indexed datasets for training: PREFIX_KEY_document.bin and .idx, with a manifest.

The flags are those of Megatron-LM. For the same documents, the files equal Megatron-LM's byte for byte, with any number
of worker processes.

Exit codes: 0 success; 2 an error in flags or input, or a full disk (no partial output is left); 3 a worker process
ended unexpectedly; 130 and 143 interrupted by SIGINT and SIGTERM. After exit codes 3, 130 and 143, the same command
with --resume continues the work.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

if __name__ == "__main__":  # during the slow imports, Ctrl-C should end the tool without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.preprocess_config import IgnoredConfig, InputConfig, PreprocessConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig

EXIT_WORKER_DIED = 3
EXAMPLE = (
    "python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus "
    "--tokenizer-type GPT2BPETokenizer --vocab-file data/tokenizer/vocab.json "
    "--merge-file data/tokenizer/merges.txt --append-eod"
)


class _Stopped(BaseException):
    """Raised when SIGINT or SIGTERM arrives."""


def _stop(number: int, frame: FrameType | None) -> None:
    _handle_signals(signal.SIG_IGN)  # a second signal would interrupt the clean-up
    raise _Stopped(number)


def _handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class PreprocessFlags:
    """Flags of this tool."""

    input: InputConfig
    tokenizer: TokenizerConfig
    output: PreprocessConfig
    ignored: IgnoredConfig


def main() -> int:
    """Writes the datasets, prints a summary and returns the exit code."""
    flags = parse(
        PreprocessFlags,
        prog="tools/preprocess_data.py",
        description=str(__doc__),
        example=EXAMPLE,
    )
    # Libraries must not start threads: each worker has only one core, and only a process without threads can safely
    # fork workers that share its loaded data.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    from megatron_ext.data.preprocess.preprocess import Preprocessor, quarantined_path, rejected_path
    from megatron_ext.data.preprocess.worker_pool import WorkerBug, WorkerDied

    output = flags.output
    ignored = [*output.without_effect(), *flags.ignored.without_effect()]
    if ignored:
        print(f"ignored: {', '.join(ignored)}; see --help", file=sys.stderr)
    try:
        # Raise on a signal, so that the preprocessor's clean-up runs before the process ends.
        _handle_signals(_stop)
        summary = Preprocessor(flags.input, flags.tokenizer, output).run()
        _handle_signals(signal.SIG_DFL)
    except (WorkerDied, WorkerBug) as error:
        print(f"error: {error}; --resume continues from the finished pieces", file=sys.stderr)
        return EXIT_WORKER_DIED
    except _Stopped as stop:
        print("interrupted; --resume continues from the finished pieces", file=sys.stderr)
        return 128 + int(stop.args[0])
    totals = summary.totals
    if summary.choice is not None:
        print(f"encoded with {summary.choice.encoder} ({summary.choice.reason})")
    if summary.message is not None:
        print(f"note: {summary.message}")
    if summary.resumed_shards:
        print(f"resumed: {summary.resumed_shards} finished pieces reused")
    for prefix, tokens, empty in zip(summary.prefixes, totals.tokens, totals.empty, strict=True):
        documents = f"{totals.documents:,} document{'s' if totals.documents != 1 else ''}"
        print(f"{prefix}: {documents} ({empty:,} empty), {tokens:,} tokens")
    if totals.skipped_empty:
        print(f"skipped: {totals.skipped_empty:,} empty documents")
    if totals.rejected:
        kept = (
            f", kept in {quarantined_path(output.output_prefix)}" if output.on_error == "quarantine" else ""
        )
        print(f"rejected: {totals.rejected:,} lines, listed in {rejected_path(output.output_prefix)}{kept}")
    if totals.blank:
        print(f"ignored: {totals.blank:,} blank lines")
    rate = f", {totals.text_bytes / 1e6 / summary.seconds:.1f} MB/s" if not summary.resumed_shards else ""
    print(f"{totals.text_bytes / 1e6:,.1f} MB of input; {summary.seconds:.1f} s{rate}")
    return 0


if __name__ == "__main__":
    run_main(main)
