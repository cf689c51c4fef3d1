"""`--profile`: records some steps of a run with torch's profiler, or marks them for NVIDIA's profiler.

torch's profiler writes a trace for each profiled rank to TensorBoard's directory, `rank_{r}.*.pt.trace.json`, which
TensorBoard's profiler plugin and https://ui.perfetto.dev show. NVIDIA's profiler, which is started with `nsys profile
--capture-range cudaProfilerApi`, writes its own files; the run only marks the first and the last step to record.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import profile, schedule, tensorboard_trace_handler

from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.platform import process_groups

BeforeStep = Callable[[int], None]
"""Called with the number of each step, from 1, before the step begins."""


@contextmanager
def profiling(
    logging: LoggingConfig, message: Callable[[str], None] = lambda text: None
) -> Iterator[BeforeStep]:
    """Context manager that yields a function to call before every step; this function starts and ends the recording.

    A recording that still runs when the block ends is written, too.

    Args:
        logging: the flags of the profiler.
        message: prints a line for the user; called on every rank.
    """
    if not logging.profile or (logging.profile_ranks and process_groups.rank() not in logging.profile_ranks):
        yield lambda iteration: None
    elif logging.use_pytorch_profiler:
        recording = _Recording(logging)
        try:
            yield recording.before_step
        finally:
            recording.end()
    elif process_groups.use_cuda():
        with _marked_for_nvidia(logging) as before_step:
            yield before_step
    else:
        message("--profile: there is no GPU to profile; --use-pytorch-profiler also records on a CPU")
        yield lambda iteration: None


class _Recording:
    """A recording with torch's profiler; the step before the first recorded one warms the profiler up."""

    def __init__(self, logging: LoggingConfig) -> None:
        self._logging = logging
        self._profiler: profile | None = None

    def before_step(self, iteration: int) -> None:
        first, end = self._logging.profile_step_start, self._logging.profile_step_end
        if self._profiler is not None:
            self._profiler.step()
            if iteration >= end:
                self.end()
        elif first - 1 <= iteration < end:
            self._begin(warmup=int(iteration < first), active=end - max(first, iteration))

    def end(self) -> None:
        """Ends the recording if it runs, and writes the trace if it has not been written yet."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _begin(self, *, warmup: int, active: int) -> None:
        assert self._logging.tensorboard_dir is not None
        self._profiler = profile(
            schedule=schedule(wait=0, warmup=warmup, active=active, repeat=1),
            on_trace_ready=tensorboard_trace_handler(
                self._logging.tensorboard_dir, worker_name=f"rank_{process_groups.rank()}"
            ),
            record_shapes=self._logging.pytorch_profiler_collect_shapes,
            with_stack=self._logging.pytorch_profiler_collect_callstack,
        )
        self._profiler.start()


@contextmanager
def _marked_for_nvidia(logging: LoggingConfig) -> Iterator[BeforeStep]:
    runtime, is_running = torch.cuda.cudart(), False

    def before_step(iteration: int) -> None:
        nonlocal is_running
        wanted = logging.profile_step_start <= iteration < logging.profile_step_end
        if wanted != is_running:
            torch.cuda.synchronize()
            torch.cuda.check_error(runtime.cudaProfilerStart() if wanted else runtime.cudaProfilerStop())
            is_running = wanted

    try:
        yield before_step
    finally:
        if is_running:
            torch.cuda.check_error(runtime.cudaProfilerStop())
