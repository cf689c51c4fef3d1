"""The record of allocations: sizes, kinds, the peak and what is live then."""

import torch

from megatron_ext.rehearsal.recording.memory_log import ACTIVATIONS, OPTIMIZER, TEMPORARY, WEIGHTS, MemoryLog

KIB = 1024


def allocate(
    log: MemoryLog, kib: float, kind: str, phase: str = "update", place: str = "here"
) -> torch.Tensor:
    tensor = torch.empty(int(kib * KIB), dtype=torch.uint8)
    log.add(tensor.untyped_storage(), kind, "step 1", phase, place)
    return tensor


def test_the_peak_is_what_is_live_at_its_time() -> None:
    log = MemoryLog()
    weights = allocate(log, 4, WEIGHTS)
    activation = allocate(log, 8, ACTIVATIONS, place="layer")
    del activation
    temporary = allocate(log, 2, TEMPORARY)
    peak = log.at_peak()
    assert peak.size == log.peak == 12 * KIB
    assert peak.kinds == {WEIGHTS: 4 * KIB, ACTIVATIONS: 8 * KIB}
    assert peak.places[ACTIVATIONS, "layer"] == 8 * KIB
    assert log.live == 6 * KIB
    del weights, temporary
    assert log.live == 0


def test_a_view_is_no_allocation() -> None:
    log = MemoryLog()
    tensor = allocate(log, 4, WEIGHTS)
    assert log.knows(tensor[1:].untyped_storage())
    assert not log.knows(tensor.clone().untyped_storage())


def test_sizes_are_rounded_up_to_the_allocators_blocks() -> None:
    log = MemoryLog()
    tensor = allocate(log, 0.25, WEIGHTS)
    assert tensor.numel() == 256
    assert log.live == 512


def test_what_a_phase_keeps_changes_its_kind_also_in_an_earlier_peak() -> None:
    log = MemoryLog()
    moments, other = allocate(log, 4, TEMPORARY, "update"), allocate(log, 1, TEMPORARY, "loss")
    freed = allocate(log, 2, TEMPORARY, "update")
    del freed
    log.keep("update", OPTIMIZER)
    assert log.at_peak().kinds == {OPTIMIZER: 4 * KIB, TEMPORARY: 3 * KIB}
    del moments, other


def test_the_peak_of_a_phase_is_the_largest_while_the_phase_allocates() -> None:
    log = MemoryLog()
    first = allocate(log, 8, ACTIVATIONS, "forward")
    del first
    second = allocate(log, 2, TEMPORARY, "update")
    assert log.at_peak(phase="forward").size == 8 * KIB
    assert log.at_peak(phase="update").size == 2 * KIB
    assert log.at_peak(["step 2"]).size == 0
    del second


def test_marked_tensors_are_of_the_given_kind() -> None:
    log = MemoryLog()
    tensor = allocate(log, 4, TEMPORARY)
    log.mark([tensor[:10], torch.empty(3)], WEIGHTS, "parameters")
    assert log.at_peak().places == {(WEIGHTS, "parameters"): 4 * KIB}
