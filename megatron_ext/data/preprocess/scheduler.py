"""Gives chunks to worker processes and their shards to the assembly, in order."""

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
from megatron_ext.data.preprocess.worker_pool import (
    Closable,
    Done,
    Failed,
    Report,
    TaskFunction,
    WorkerPool,
    WorkerProgress,
)
from megatron_ext.data.readers import Chunk, read_chunk
from megatron_ext.data.readers.lines import count_line_starts
from megatron_ext.data.tokenizers import build_tokenizer

_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process is started with.

    Attributes:
        tokenizer, encoder_name: what to tokenize with.
        options: the run's.
        encoder: the parent's, which a forked worker inherits; a spawned one gets None and builds its own.
    """

    tokenizer: TokenizerConfig
    encoder_name: EncoderName
    options: ShardOptions
    encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker gets: the libraries' objects cannot be pickled."""
        return {**self.__dict__, "encoder": None}


@dataclass(frozen=True)
class _Task:
    index: int
    chunk: Chunk
    limit: int | None

    def __str__(self) -> str:
        return str(self.chunk)


def make_worker(settings: WorkerSettings) -> TaskFunction:
    """Marks the directory, has the tokenizer ready and returns the function that handles a task."""
    held = hold_as_worker(settings.options.directory)
    encoder = settings.encoder or Encoder(build_tokenizer(settings.tokenizer), settings.encoder_name)

    def handle(task: _Task, report: Report) -> ShardInfo:
        def tell(info: ShardInfo) -> None:
            report((task.index, info.documents, sum(info.tokens), info.text_bytes))

        assert not held.closed
        try:
            return encode_chunk(settings.options, task.index, task.chunk, encoder, task.limit, tell)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None

    return handle


class LongLines:
    """Keeps the lines of a stream that are too long to hold: each becomes a shard that the parent writes itself."""

    def __init__(self, options: ShardOptions) -> None:
        self._options = options
        self._writer: ShardWriter | None = None
        self.next_index = 0

    def write(self, data: bytes) -> None:
        """Takes a piece of the line that will be chunk number `next_index`."""
        if self._writer is None:
            self._writer = ShardWriter(self._options, self.next_index)
        self._writer.keep_raw(data)

    def finish(self, index: int, chunk: Chunk) -> ShardInfo:
        """Completes the shard of the line."""
        writer = self._writer or ShardWriter(self._options, index)
        self._writer = None
        for batch in read_chunk(chunk, self._options.keys, self._options.max_line_bytes):
            writer.add(batch, None)
        return writer.finish(chunk.input_bytes)


class Scheduler:
    """One pass over the chunks.

    Args:
        chunks: all chunks, in order.
        assembly: gets the shards; says which have been appended by the run that is resumed.
        options: for the shards.
        long_lines: what the chunks' iterator hands its long lines to.
        max_documents: stop after this many documents; needs a single worker.
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
        """Handles every chunk.

        Args:
            settings: for the workers.
            workers: processes, at most.
            display: shown while they work; not started yet, since its thread would forbid a fork.
            lock: of the working directory, which is the parent's alone.

        Raises:
            ValueError: a line is no document and the run shall stop; or what a worker met.
            OSError: no space left, or another error of the system.
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
            for message in pool.wait(_WAIT_SECONDS):
                self._handle(message)
            if self._max_documents is None:  # else the next task depends on what is appended
                self._submit(pool, tasks)
            self._append_finished()
            self._show(display)
        self._append_finished()  # what needed no worker, after the last task

    def _submit(self, pool: WorkerPool, tasks: Iterator[_Task]) -> bool:
        submitted = False
        while pool.num_idle and (task := next(tasks, None)) is not None:
            pool.submit(task)
            submitted = True
        return submitted

    def _next_task(self) -> _Task | None:
        """Returns the next chunk that a worker has to handle, after noting those that need none."""
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
            self._pending[index] = dataclasses.replace(chunk, data=None)  # the text itself goes with the task
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

    def _handle(self, message: WorkerProgress | Done | Failed) -> None:
        if isinstance(message, WorkerProgress):
            index, *counts = message.value
            self._running[index] = counts
        elif isinstance(message, Done):
            self._running.pop(message.task.index, None)
            self._finished[message.task.index] = message.result
        elif isinstance(message.error, RejectedLine):
            raise ValueError(self._place(message.task.index, message.error))
        else:
            raise message.error

    def _append_finished(self) -> None:
        state = self._assembly.state
        while (info := self._finished.pop(state.next_shard, None)) is not None:
            chunk = self._pending.pop(state.next_shard)
            self._assembly.append(info, chunk.source_index)

    def _place(self, index: int, error: RejectedLine) -> str:
        """Returns the message for a line that stops the run: file, line, byte offset, reason."""
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
