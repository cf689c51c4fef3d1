"""Runs one rank's rehearsal in a process that has the simulated device, and prints its report."""

import contextlib
import functools
import io
import os
import resource
import time
from collections.abc import Callable

import torch
import torch._dynamo  # the first optimizer would import this module, but the import must happen before torch is changed
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ext.config.run_config import C
from megatron_ext.platform import run_phases
from megatron_ext.rehearsal.recording.activity import Activity
from megatron_ext.rehearsal.recording.recorder import Recorder
from megatron_ext.rehearsal.report import Rehearsal, fits, fused_kernels, print_report
from megatron_ext.rehearsal.simulated import fake_collectives, fake_cuda, fake_kernels
from megatron_ext.rehearsal.simulated.devices import Device, device_named

DOES_NOT_FIT = 1
"""Exit code of a rehearsal whose peak exceeds the device's memory."""


@functools.cache
def simulate(device: Device) -> Recorder:
    """Installs the simulated device and process group in this process; returns the recorder that observes them.

    Call this before the engine is imported, because the engine then imports some functions of torch by name. Later
    calls return the same recorder.
    """
    recorder = Recorder(Activity())
    fake_cuda.install(device, recorder.activity, recorder.memory)
    fake_collectives.install(recorder.activity)
    fake_kernels.install()
    return recorder


def rehearse_rank(config: C, run: Callable[[C], int]) -> int:
    """Calls `run(config)` on the simulated device, as the rank in the environment variable RANK; returns the exit code.

    The exit code is the run's own code if that is not 0, otherwise `DOES_NOT_FIT` or 0.
    """
    device = device_named(config.rehearsal.rehearsal_device, config.rehearsal.device_memory_gb)
    recorder = simulate(device)
    run_phases.observer = recorder
    # Suppress the run's output, because it is about values, and there are none.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(allow_non_fake_inputs=True),
        recorder,
    ):
        code = run(config)
    recorder.close()
    run_phases.observer = None
    if code:
        return code
    rehearsal = Rehearsal(
        rank=int(os.environ["RANK"]),
        processes=int(os.environ["WORLD_SIZE"]),
        parallel=config.parallel,
        training=config.training,
        sequence_length=config.model.seq_length,
        device=device,
        kernels=fused_kernels(config.model, config.parallel),
        recorder=recorder,
        seconds=time.process_time(),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    print_report(rehearsal)
    return DOES_NOT_FIT if fits(rehearsal.peak.size, device) == "does not fit" else 0
