"""Every family in many layouts, as a rank of eight on the simulated GPU.

A rehearsal that ends well has mixed no devices and sent only tensors that NCCL accepts; its notes name CPU tensors in
collectives and groups that are not used.
"""

import pytest

from megatron_ext.testing.rehearsing.rehearsals import rehearse
from tests.integration.rehearsal.rehearsal_flags import (
    CP,
    FULL,
    GROWN,
    INTERLEAVED,
    OVERLAP,
    OVERLAPPED,
    PLAIN,
    PLE,
    PP,
    SHARDED,
    SP,
    TP,
    needs_device,
)

pytestmark = needs_device

GPT, NPT, PROGRESSIVE = "pretrain_gpt_per_layer.py", "pretrain_npt.py", "pretrain_progressive.py"
BF16 = "--bf16 "
FROM_SCRATCH = "--no-freeze-base --np-rank 4 "
FROZEN = "--np-rank 4 "
LEARNED = PLAIN.replace("--position-embedding-type rope", "--position-embedding-type learned_absolute")

# The script, the rehearsed rank, how often the host may wait for the device in a step, and the flags. One wait reads
# the step's values; in a step that is not logged, the device computes the next step meanwhile.
CASES = {
    "bf16": (GPT, 0, 1, PLAIN + BF16 + TP + PP + SP + SHARDED),
    "bf16, last stage": (GPT, 7, 1, PLAIN + BF16 + TP + PP + SP + SHARDED),
    "fp32, last stage": (GPT, 7, 1, PLAIN + TP + PP + SP),
    "overlap": (GPT, 0, 1, PLAIN + BF16 + TP + SHARDED + OVERLAP),
    "interleaved": (GPT, 7, 1, PLAIN + BF16 + TP + PP + SP + SHARDED + INTERLEAVED),
    "interleaved, overlapped": (GPT, 0, 1, PLAIN + BF16 + TP + PP + SP + SHARDED + OVERLAPPED),
    "context parallel": (GPT, 0, 1, PLAIN + BF16 + CP + PP + SHARDED),
    "context parallel, fp32, last stage": (GPT, 7, 1, PLAIN + CP + TP + PP + SP + FULL),
    "context parallel, masks of documents": (GPT, 3, 1, PLAIN + BF16 + CP + TP + "--reset-attention-mask "),
    "full recomputation": (GPT, 0, 1, PLAIN + BF16 + TP + FULL),
    "unfused attention, dropout": (
        GPT,
        0,
        1,
        PLAIN + BF16 + TP + "--attention-backend local --hidden-dropout 0.1 --attention-dropout 0.1 ",
    ),
    "learned positions": (GPT, 0, 1, LEARNED + BF16 + TP + PP + SP + SHARDED),
    "learned positions, PLE": (GPT, 0, 1, LEARNED + TP + PLE),
    "learned positions, NPT": (NPT, 0, 1, LEARNED + BF16 + TP + FROZEN),
    "masks of documents": (GPT, 0, 1, PLAIN + TP + "--reset-attention-mask "),
    "documents in one kernel, windows": (
        GPT,
        0,
        1,
        PLAIN
        + BF16
        + TP
        + PP
        + "--reset-attention-mask --reset-position-ids --window-size 15,0 --window-attn-skip-freq 2 ",
    ),
    "adapters, PLE, last stage": (GPT, 7, 1, PLAIN + BF16 + TP + PP + SP + SHARDED + PLE + "--lora-rank 4 "),
    "PLE, last stage": (
        GPT,
        7,
        1,
        PLAIN + BF16 + TP + PP + SP + SHARDED + PLE + "--per-layer-preset gemma4 ",
    ),
    "PLE, interleaved": (
        GPT,
        7,
        1,
        PLAIN + TP + PP + INTERLEAVED + PLE + "--per-layer-combination-method concat ",
    ),
    # The statistics are read before the update.
    "PLE, statistics": (
        GPT,
        0,
        2,
        PLAIN
        + BF16
        + TP
        + SP
        + PLE
        + "--log-per-layer-stats --log-per-layer-gradients --per-layer-stats-interval 1 ",
    ),
    # The number of rows depends on the ids.
    "PLE, rows": (GPT, 7, 2, PLAIN + BF16 + TP + PP + SP + SHARDED + PLE + "--per-layer-sparse "),
    # All rows are brought up to date first; their share and the layers' values are read before the update.
    "PLE, rows, fp32, statistics": (
        GPT,
        0,
        5,
        PLAIN + TP + PLE + "--per-layer-sparse --log-per-layer-stats --per-layer-stats-interval 1 ",
    ),
    "PLE, context parallel": (GPT, 0, 1, PLAIN + BF16 + CP + TP + SP + PLE),
    "NPT, from scratch": (NPT, 7, 1, PLAIN + BF16 + TP + PP + SP + SHARDED + FROM_SCRATCH),
    "NPT, key_value": (
        NPT,
        0,
        1,
        PLAIN + BF16 + TP + SP + FROZEN + "--np-form key_value --np-target gate+up+down ",
    ),
    "NPT, curriculum": (
        NPT,
        1,
        1,
        PLAIN
        + BF16
        + TP
        + FROZEN
        + "--mode multi_layer --npt-layers all --curriculum-stages teacher:1,mixed:1,student:98 ",
    ),
    "NPT, context parallel, teacher": (
        NPT,
        1,
        1,
        PLAIN
        + BF16
        + CP
        + TP
        + FROZEN
        + "--mode multi_layer --npt-layers all --curriculum-stages teacher:1,mixed:1,student:98 "
        + "--layer-losses document ",
    ),
    # The second step begins a stage with other losses, whose names the ranks exchange.
    "NPT, one layer": (
        NPT,
        7,
        6,
        PLAIN + BF16 + TP + PP + SP + FROZEN + "--mode single_layer --npt-layers 3 --stage1-steps 1 ",
    ),
    "NPT, recomputation": (NPT, 0, 1, PLAIN + BF16 + TP + FROZEN + FULL),
    "progressive, frozen trunk": (
        PROGRESSIVE,
        1,
        1,
        GROWN + BF16 + TP + SP + "--training-objective clm --no-qlora-enabled ",
    ),
    "progressive, context parallel": (
        PROGRESSIVE,
        1,
        1,
        GROWN + BF16 + CP + TP + SP + "--training-objective mlm --trunk-strategy qlora ",
    ),
    "progressive, LoRA": (
        PROGRESSIVE,
        1,
        1,
        GROWN + BF16 + TP + SP + "--training-objective mlm --trunk-strategy qlora ",
    ),
    "progressive, diffusion": (
        PROGRESSIVE,
        7,
        1,
        GROWN
        + BF16
        + TP
        + PP
        + SP
        + "--training-objective diffusion --time-interpretation input --building-mode prepend ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_of_eight_runs_on_the_device(case: str) -> None:
    script, rank, most_waits, flags = CASES[case]
    rehearsed = rehearse(script, *flags.split(), processes=8, rank=rank)
    assert rehearsed.error is None
    assert rehearsed.activity.step == 2
    assert rehearsed.peak.size > 0
    assert rehearsed.notes == []
    assert sum(rehearsed.waits().values()) <= most_waits, rehearsed.waits()


def test_only_overlapped_stages_compute_while_they_exchange_activations() -> None:
    flags = PLAIN + BF16 + PP
    waited, overlapped = (
        _asynchronous(*(flags + more).split(), "--global-batch-size", "16")
        for more in (INTERLEAVED, OVERLAPPED)
    )
    assert set(waited) == {False}
    # In the steady phase all are overlapped, but neither in the warm-up nor at the end of the step.
    assert 0.4 < sum(overlapped) / len(overlapped) < 0.9
    assert len(overlapped) == len(waited)


def _asynchronous(*flags: str) -> list[bool]:
    """Whether each message between stages in the last step is overlapped."""
    rehearsed = rehearse(GPT, *flags, processes=8)
    assert rehearsed.error is None
    return [
        call.asynchronous
        for (scope, call), total in rehearsed.activity.communication.items()
        for _ in range(total.calls)
        if scope == rehearsed.step and call.operation in ("send", "receive")
    ]
