"""The rehearsed peak against the peak that the same run has on the CPU, where every storage is counted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.rehearsing.rehearsals import rehearse
from tests.integration.rehearsal.rehearsal_flags import GROWN, PLAIN, PLE, needs_device

pytestmark = needs_device

# Larger than the other rehearsals' model, so that activations make up most of the memory. As many groups as heads: GPUs
# have no fused attention for grouped queries in fp32. Throughput is not logged: the CPU's rate would be measured with
# matrices of several MiB.
SIZES = "--num-query-groups 8 --hidden-size 128 --seq-length 128 --micro-batch-size 4 --no-log-throughput "

RUNS = {
    "PLE": ("pretrain_gpt_per_layer.py", PLAIN + PLE),
    "bf16": ("pretrain_gpt_per_layer.py", PLAIN + "--bf16 "),
    "NPT": ("pretrain_npt.py", PLAIN + "--np-rank 8 "),
    "progressive": ("pretrain_progressive.py", GROWN + "--training-objective mlm --trunk-strategy qlora "),
}


def measure_on_the_cpu() -> None:
    """Lets `--rehearse` run on the CPU instead of the simulated device, and print the peak of its allocations."""
    from megatron_ext.platform.allocations import AllocationCounter
    from megatron_ext.rehearsal import rehearse as command

    def run_or_rehearse(config: Any, run: Callable[[Any], int]) -> int:
        with AllocationCounter() as counter:
            code = run(
                dataclasses.replace(config, training=dataclasses.replace(config.training, dry_run=True))
            )
        print(f"peak {counter.peak}")
        return code

    module: Any = command
    module.run_or_rehearse = run_or_rehearse


@pytest.mark.parametrize("name", RUNS)
def test_the_rehearsed_peak_is_within_5_percent_of_the_measured(name: str) -> None:
    script, flags = RUNS[name]
    given = (flags + SIZES).split()
    done = run_script(script, *given, "--rehearse", before=measure_on_the_cpu)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.rsplit("peak ", 1)[1])
    rehearsed = rehearse(script, *given, processes=1)
    assert rehearsed.error is None
    assert rehearsed.peak.size == pytest.approx(measured, rel=0.05)


def test_the_loss_of_a_large_vocabulary_needs_little_more_than_logits_and_softmax() -> None:
    length, vocabulary = 4096, 128_000
    flags = f"--bf16 --vocab-size {vocabulary} --seq-length {length} --global-batch-size 1".split()
    rehearsed = rehearse("pretrain_gpt_per_layer.py", *PLAIN.split(), *flags, processes=1)
    assert rehearsed.error is None
    # Both have two bytes per value; the fp32 values of all tokens at once would be four more, and their softmax too.
    assert 4 * length * vocabulary < rehearsed.peak.kinds["activations"] < 6 * length * vocabulary
