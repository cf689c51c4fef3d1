#!/usr/bin/env python3
"""Runs what a rehearsal would run, but on this machine's device, and measures the figures that rehearsals predict.

    python benchmarks/gpu/measured_run.py pretrain_npt.py FLAGS --rehearse

The last line of the output is `measured` and a JSON object:

    peak        largest number of bytes in torch's tensors; on a CPU without the temporary tensors of kernels
    reserved    largest number of bytes that torch's CUDA allocator has reserved; absent on a CPU
    waits       CUDA calls, by name, with which the host waits for the device in the second step; null on a CPU
    copies      copies from the device to the host in the second step; null on a CPU
"""

import dataclasses
import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.platform import run_phases
from megatron_ext.platform.allocations import AllocationCounter
from megatron_ext.platform.process_groups import use_cuda
from megatron_ext.rehearsal import rehearse

_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
_RANGE = "the measured step"


class SecondStep:
    """Observes the run's phases and counts, with torch's profiler, the waits of the second step."""

    def __init__(self) -> None:
        self.steps = 0
        self.waits: Counter[str] = Counter()
        self.copies = 0
        self._profiler: Any = None
        self._range: Any = None

    def begin(self, phase: str) -> None:
        """Starts the profiler at the second step; the first one compiles and allocates."""
        self.steps += phase == run_phases.STEP
        if phase == run_phases.STEP and self.steps == 2:
            kinds = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(
                activities=[kinds.CPU, *([kinds.CUDA] if use_cuda() else [])]
            )
            self._profiler.start()
            self._range = torch.profiler.record_function(_RANGE)
            self._range.__enter__()

    def end(self, phase: str, result: Any) -> None:
        """Counts the waits and copies when the second step ends."""
        if phase != run_phases.STEP or self.steps != 2:
            return
        self._range.__exit__(None, None, None)
        self._profiler.stop()
        events = self._profiler.events()
        step = next(event.time_range for event in events if event.name == _RANGE)
        for event in events:
            # The profiler itself waits for the device when it starts and when it stops.
            if step.start <= event.time_range.start <= step.end:
                self.waits[event.name] += event.name in _WAITS
                self.copies += event.name.startswith("Memcpy DtoH")


def run_measured(config: Any, run: Callable[[Any], int]) -> int:
    """Replaces `run_or_rehearse`: trains as in a rehearsal, and prints the measured figures."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, dry_run=True))
    found: dict[str, Any] = {"waits": None, "copies": None}
    run_phases.observer = step = SecondStep()
    with AllocationCounter() as counter:
        code = run(config)
        found["peak"] = counter.peak
    if use_cuda():
        found |= {"waits": dict(+step.waits), "copies": step.copies}
        found["reserved"] = torch.cuda.max_memory_reserved()
    print(f"measured {json.dumps(found)}")
    return code


def main() -> None:
    """Runs the script that the command line names."""
    module: Any = rehearse
    module.run_or_rehearse = run_measured
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
