"""The rehearsed peak against the peak that the same run has on the CPU, where every storage is counted."""

import json

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


@pytest.mark.parametrize("name", RUNS)
def test_the_rehearsed_peak_is_within_5_percent_of_the_measured(name: str) -> None:
    script, flags = RUNS[name]
    given = (flags + SIZES).split()
    done = run_script("benchmarks/gpu/measured_run.py", script, *given, "--rehearse")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.rsplit("measured ", 1)[1])["peak"]
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
