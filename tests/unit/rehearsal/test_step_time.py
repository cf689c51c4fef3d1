"""The estimated time of a step, from what a rank did and from its device's rates."""

import pytest
import torch

from megatron_ext.platform.run_phases import FORWARD_BACKWARD, STEP, UPDATE
from megatron_ext.rehearsal.recording.activity import Activity, Call, Total
from megatron_ext.rehearsal.recording.recorder import Recorder
from megatron_ext.rehearsal.simulated.devices import device_named
from megatron_ext.rehearsal.step_time import seconds, step_time

H100 = device_named("h100", None)


def call(
    operation: str,
    *,
    group: str = "TP",
    size: int = 8,
    hosts: int = 1,
    device: str = "cuda",
    waits: bool = True,
) -> Call:
    return Call(operation, group, size, device, not waits, hosts, "here")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (call("all-reduce"), 2 * 7 / 8 * 450e9 / 450e9),
        (call("all-gather"), 7 / 8),
        (call("reduce-scatter", size=2), 1 / 2),
        (call("send"), 1.0),
        (call("all-gather", hosts=2), 7 / 8 * 9),
        (call("all-reduce", size=1), 0.0),
        (call("all-gather of objects", device="object"), 0.0),
    ],
)
def test_communication_takes_the_time_of_a_ring_on_its_slowest_link(made: Call, expected: float) -> None:
    assert seconds(made, Total(calls=1, bytes=int(450e9)), H100) == pytest.approx(expected)


def test_a_step_is_the_sum_of_its_parts_with_the_bubble_on_what_the_pipeline_does() -> None:
    recorder = Recorder(Activity())
    recorder.close()
    recorder.activity.begin(STEP)
    recorder.flops["step 1", FORWARD_BACKWARD, torch.bfloat16] = int(2 * 989.4e12)
    recorder.flops["evaluation", FORWARD_BACKWARD, torch.bfloat16] = 10**18
    recorder.traffic["step 1", FORWARD_BACKWARD, "a layer"] = int(3350e9)
    recorder.traffic["step 1", UPDATE, UPDATE] = int(0.5 * 3350e9)
    recorder.activity.communicates(call("send"), int(450e9))
    recorder.activity.communicates(call("all-gather", size=2, waits=False), int(450e9))
    recorder.activity.communicates(call("receive"), int(450e9 / 4))  # while the link sends
    time = step_time(recorder, H100, "step 1", bubble=0.5)
    assert (time.products, time.other, time.update) == pytest.approx((2.0, 1.0, 0.5))
    assert (time.waited, time.hidden) == pytest.approx((1.0, 0.5))
    assert time.total == pytest.approx(4 * 1.5 + 0.5)


def test_the_bubble_does_not_multiply_what_a_step_does_once() -> None:
    recorder = Recorder(Activity())
    recorder.close()
    recorder.activity.begin(STEP)
    recorder.traffic["step 1", FORWARD_BACKWARD, "a layer"] = int(3350e9)
    recorder.traffic["step 1", FORWARD_BACKWARD, FORWARD_BACKWARD] = int(3350e9)  # gradients are set to zero
    recorder.activity.communicates(call("all-gather", group="CP", size=2), int(450e9))  # keys: 0.5 s
    for operation in ("reduce-scatter", "all-gather"):
        recorder.activity.communicates(call(operation, group="DP", size=2), int(450e9))
    time = step_time(recorder, H100, "step 1", bubble=0.5)
    assert time.once == pytest.approx(1 + 2 * 0.5)
    assert time.total == pytest.approx((1 + 0.5) * 1.5 + time.once)


def test_fp32_products_take_the_rate_of_fp32() -> None:
    recorder = Recorder(Activity())
    recorder.close()
    recorder.flops["step 1", FORWARD_BACKWARD, torch.float32] = int(66.9e12)
    assert step_time(recorder, H100, "step 1", bubble=0.0).total == pytest.approx(1.0)
