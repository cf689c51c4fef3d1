"""Gives chunks of the input to worker processes, which write a shard for each, and appends the shards in order."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.preprocess.assembly import Assembly
from megatron_ext.data.preprocess.encoding import Encoder, EncoderName
from megatron_ext.data.preprocess.preprocess_progress import ProgressDisplay
from megatron_ext.data.preprocess.shards import (
    RejectedLine,
    ShardInfo,
    ShardOptions,
    ShardWriter,
    encode_chunk,
    read_finished_shard,
    remove_shard,
)
from megatron_ext.data.preprocess.work_directory import hold_as_worker
from megatron_ext.data.preprocess.worker_pool import Closable, Report, TaskFunction, WorkerPool
from megatron_ext.data.readers import Chunk, read_chunk
from megatron_ext.data.readers.lines import count_line_starts
from megatron_ext.data.tokenizers import build_tokenizer

_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerSettings:
    """Settings passed to a worker process when it starts.

    Attributes:
        tokenizer: configuration of the tokenizer to build.
        encoder_name: the library that tokenizes.
        options: how to write shards.
        encoder: the parent's encoder, which a forked worker inherits; a spawned worker gets None and builds its own.
    """

    tokenizer: TokenizerConfig
    encoder_name: EncoderName
    options: ShardOptions
    encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Omits the encoder, because the objects of the tokenizer libraries cannot be pickled."""
        return {**self.__dict__, "encoder": None}


@dataclass(frozen=True)
class _Task:
    index: int
    chunk: Chunk
    limit: int | None

    def __str__(self) -> str:
        return str(self.chunk)


def make_worker(settings: WorkerSettings) -> TaskFunction:
    """Locks the working directory, builds the tokenizer and returns the function that handles one task."""
    held = hold_as_worker(settings.options.directory)
    encoder = settings.encoder or Encoder(build_tokenizer(settings.tokenizer), settings.encoder_name)

    def handle(task: _Task, report: Report) -> ShardInfo:
        def report_counts(info: ShardInfo) -> None:
            report((task.index, info.documents, sum(info.tokens), info.text_bytes))

        assert (
            not held.closed
        )  # a reference from this function keeps the lock's file open as long as the worker lives
        try:
            return encode_chunk(settings.options, task.index, task.chunk, encoder, task.limit, report_counts)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None

    return handle


class LongLines:
    """Writes a shard for each line of a stream that is too long for memory.

    Such a line is rejected, so the parent process writes its shard instead of sending the line to a worker. With
    `--on-error quarantine` the shard also holds the line itself.
    """

    def __init__(self, options: ShardOptions) -> None:
        self._options = options
        self._writer: ShardWriter | None = None
        self.next_index = 0

    def write(self, data: bytes) -> None:
        """Copies a piece of a long line, which will be chunk number `next_index`, to its shard's quarantine file."""
        if self._writer is None:
            self._writer = ShardWriter(self._options, self.next_index)
        self._writer.keep_raw(data)

    def finish(self, index: int, chunk: Chunk) -> ShardInfo:
        """Finishes the shard of a long line and returns its counts."""
        writer = self._writer or ShardWriter(self._options, index)
        self._writer = None
        for batch in read_chunk(chunk, self._options.keys, self._options.max_line_bytes):
            writer.add(batch, None)
        return writer.finish(chunk.input_bytes)


class Scheduler:
    """One pass over all chunks: hands them to workers and appends the resulting shards in order.

    Args:
        chunks: all chunks, in order.
        assembly: appends the shards; knows which shards a killed run has already appended.
        options: how to write shards.
        long_lines: receives the long lines that the iterator `chunks` finds.
        max_documents: stop after this many documents; requires a single worker.
    """

    def __init__(
        self,
        chunks: Iterator[Chunk],
        assembly: Assembly,
        options: ShardOptions,
        long_lines: LongLines,
        max_documents: int | None,
    ) -> None:
        self._chunks = chunks
        self._next_index = 0
        self._assembly, self._options, self._long_lines = assembly, options, long_lines
        self._max_documents = max_documents
        self._finished: dict[int, ShardInfo] = {}
        self._pending: dict[int, Chunk] = {}
        self._running: dict[int, list[int]] = {}
        self.resumed_shards = assembly.state.next_shard

    def run(self, settings: WorkerSettings, workers: int, display: ProgressDisplay, lock: Closable) -> None:
        """Handles every chunk, with worker processes.

        Args:
            settings: settings of the workers.
            workers: the largest number of processes to start.
            display: shows the progress; must not be started yet, since a process with a second thread cannot fork.
            lock: the working directory's lock file, which workers must not hold.

        Raises:
            ValueError: a line is not a document and `on_error` is "fail"; or a worker raised a ValueError, which is
                raised again here.
            OSError: raised again from a worker, for example because the disk is full.
            WorkerDied, WorkerBug: see `worker_pool`.
        """
        task = self._next_task()
        if task is None:
            self._append_finished()
            return
        following = itertools.chain([task], iter(self._next_task, None))
        ahead = list(itertools.islice(following, workers))  # no more processes than tasks
        following = itertools.chain(ahead, following)
        passed_on = (RejectedLine, ValueError, OSError)
        pool = WorkerPool(make_worker, settings, len(ahead), passed_on, parents_own=[lock])
        try:
            with display:
                self._pass_over(pool, following, display)
        finally:
            pool.close()

    def _pass_over(self, pool: WorkerPool, tasks: Iterator[_Task], display: ProgressDisplay) -> None:
        while self._submit(pool, tasks) or pool.num_running:
            self._handle(*pool.wait(_WAIT_SECONDS))
            if (
                self._max_documents is None
            ):  # with a limit, the next task's share depends on the documents appended so far
                self._submit(pool, tasks)
            self._append_finished()
            self._show(display)
        self._append_finished()  # append the shards after the last task, which needed no worker

    def _submit(self, pool: WorkerPool, tasks: Iterator[_Task]) -> bool:
        submitted = False
        while pool.num_idle and (task := next(tasks, None)) is not None:
            pool.submit(task)
            submitted = True
        return submitted

    def _next_task(self) -> _Task | None:
        """Returns the next chunk that needs a worker; skips long lines and chunks that are finished or appended."""
        limit = self._documents_left()
        while limit != 0:
            self._long_lines.next_index = self._next_index
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            index = self._next_index
            self._next_index += 1
            long_line = self._finish_long_line(index, chunk) if chunk.long_line else None
            if index < self._assembly.state.next_shard:
                remove_shard(self._options.directory, index)
                continue
            self._pending[index] = dataclasses.replace(chunk, data=None)  # only the task keeps the text
            info = long_line or read_finished_shard(self._options.directory, index, check=True)
            if info is None:
                remove_shard(self._options.directory, index)
                return _Task(index, chunk, limit)
            self.resumed_shards += long_line is None
            self._finished[index] = info
        return None

    def _documents_left(self) -> int | None:
        if self._max_documents is None:
            return None
        totals = self._assembly.state.totals
        return self._max_documents - totals.documents - totals.skipped_empty

    def _finish_long_line(self, index: int, chunk: Chunk) -> ShardInfo:
        self._pending[index] = chunk
        try:
            return self._long_lines.finish(index, chunk)
        except RejectedLine as error:
            raise ValueError(self._place(index, error)) from None

    def _handle(self, results: list[tuple[_Task, Any]], reports: list[tuple[int, ...]]) -> None:
        self._running.update((index, counts) for index, *counts in reports)
        for task, result in results:
            if isinstance(result, RejectedLine):
                raise ValueError(self._place(task.index, result))
            if isinstance(result, Exception):
                raise result
            self._running.pop(task.index, None)
            self._finished[task.index] = result

    def _append_finished(self) -> None:
        state = self._assembly.state
        while (info := self._finished.pop(state.next_shard, None)) is not None:
            chunk = self._pending.pop(state.next_shard)
            self._assembly.append(info, chunk.source_index)

    def _place(self, index: int, error: RejectedLine) -> str:
        """Returns the error message for a line that stops the run: file, line, byte offset and reason."""
        chunk = self._pending[index]
        if chunk.source.has_columns:
            return f"{chunk.source.path}: row {(chunk.first_line or 0) + error.line + 1}: {error.reason}"
        first_line = chunk.first_line
        if first_line is None:
            state = self._assembly.state
            known = self._pending[state.next_shard]
            is_same = known.source_index == chunk.source_index
            begin = known.start if is_same else 0
            first_line = count_line_starts(chunk.source.path, begin, chunk.start)
            if is_same and state.source_index == chunk.source_index:
                first_line += state.source_lines
        return f"{chunk.source.path}: line {first_line + error.line + 1}, byte {error.offset}: {error.reason}"

    def _show(self, display: ProgressDisplay) -> None:
        totals = self._assembly.state.totals
        infos = list(self._finished.values())
        counts = [(info.documents, sum(info.tokens), info.input_bytes) for info in [totals, *infos]]
        counts += [
            (documents, tokens, min(text_bytes, self._pending[index].input_bytes))
            for index, (documents, tokens, text_bytes) in self._running.items()
        ]
        display.update(*(sum(column) for column in zip(*counts, strict=True)))
