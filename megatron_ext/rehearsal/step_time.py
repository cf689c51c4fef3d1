"""Estimates the time of a step from a rehearsed rank's operations and from its device's rates.

    products         FLOPs of matrix products and attention / peak FLOP rate
    other            bytes that other operations read and write / memory bandwidth
    communication    bytes that a ring sends / rate of the host's links, or of the network for groups on several hosts
    step             products + other + communication that the rank waits for + update + idle time of the pipeline
    idle time        bubble x the time of products, other operations and communication that every micro-batch repeats

This is a lower bound if no other stage of the pipeline is faster than this one. A real step is slower: kernels reach
only a part of these rates, and launching them takes time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ext.platform.peak_rate import known_tflops
from megatron_ext.platform.run_phases import UPDATE
from megatron_ext.rehearsal.recording.activity import Activity, Call, Total
from megatron_ext.rehearsal.recording.recorder import Recorder
from megatron_ext.rehearsal.simulated.devices import Device

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The estimated time of one step by cause, in seconds; only `bubble` is a ratio."""

    products: float
    """Matrix products."""

    other: float
    """Memory traffic of the other operations, except the optimizer's."""

    waited: float
    """Communication that the rank waits for."""

    hidden: float
    """Asynchronous communication, which is assumed to overlap with computation."""

    update: float
    """Memory traffic of the optimizer."""

    once: float
    """The part of `other` and `waited` that occurs once per step, whatever the number of micro-batches."""

    bubble: float
    """Idle time of the pipeline divided by the time of all micro-batches."""

    @property
    def idle(self) -> float:
        """Seconds for which the pipeline is idle."""
        return (self.products + self.other + self.waited - self.once) * self.bubble

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.products + self.other + self.waited + self.update + self.idle


def step_time(recorder: Recorder, device: Device, scope: str, bubble: float) -> StepTime:
    """Returns the estimated time of the step whose operations the recorder counts under the name `scope`."""
    products = 0.0
    for (of_scope, _, dtype), flops in recorder.flops.items():
        if of_scope == scope:
            products += flops / peak_flops(device, dtype)
    moved = traffic_of(recorder, scope)
    update = sum(size for (phase, _), size in moved.items() if phase == UPDATE) / device.bandwidth
    other = sum(size for (phase, _), size in moved.items() if phase != UPDATE) / device.bandwidth
    calls = calls_in(recorder.activity, scope)
    waited = {call: seconds(call, total, device) for call, total in calls.items() if not call.asynchronous}
    # A link sends and receives at the same time.
    both_ways = min(
        sum(time for call, time in waited.items() if call.operation == way) for way in ("send", "receive")
    )
    once = sum(time for call, time in waited.items() if not _in_every_micro_batch(call))
    # Operations outside modules and their backward pass zero and scale the gradients.
    once += sum(size for (phase, place), size in moved.items() if place == phase != UPDATE) / device.bandwidth
    hidden = sum(seconds(call, total, device) for call, total in calls.items() if call.asynchronous)
    return StepTime(
        products=products,
        other=other,
        waited=sum(waited.values()) - both_ways,
        hidden=hidden,
        update=update,
        once=once,
        bubble=bubble,
    )


def _in_every_micro_batch(call: Call) -> bool:
    """Returns whether every micro-batch makes this call; the other calls reduce gradients, gather weights or share a
    value.
    """
    if call.operation in ("send", "receive") or call.group == "TP":
        return True
    # Over CP, an all-gather is for keys and values, but a reduction may be for gradients.
    return call.group == "CP" and call.operation == "all-gather"


def traffic_of(recorder: Recorder, scope: str) -> dict[tuple[str, str], int]:
    """Returns the bytes that a scope's operations other than matrix products read and write, by phase and place."""
    return {
        (phase, place): size
        for (of_scope, phase, place), size in recorder.traffic.items()
        if of_scope == scope
    }


def peak_flops(device: Device, dtype: torch.dtype) -> float:
    """Returns the device's FLOP rate for matrix products of this type."""
    precision = _PRECISIONS.get(dtype, "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32")
    known = known_tflops(device.name, precision)
    assert known is not None  # every device of the rehearsal is in the table
    return known * 1e12


def calls_in(activity: Activity, scope: str) -> Mapping[Call, Total]:
    """Returns the communication of a scope."""
    return {call: total for (of_scope, call), total in activity.communication.items() if of_scope == scope}


def seconds(call: Call, total: Total, device: Device) -> float:
    """Returns the seconds that all calls of a kind take together at the rate of the slowest link between the ranks."""
    if call.device != "cuda" or call.size == 1:
        return 0.0
    ring = (call.size - 1) / call.size
    factor = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring}.get(call.operation, 1.0)
    return factor * total.bytes / (device.link if call.hosts == 1 else device.network)
