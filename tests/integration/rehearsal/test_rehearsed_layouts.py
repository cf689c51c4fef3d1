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

# The script, the rehearsed rank, how often the host may wait for the device in a step, and the flags. Most waits are
# those of megatron-core's gradient norm (one per tensor, without Transformer Engine and Apex) and of logged values.
CASES = {
    "bf16": (GPT, 0, 12, PLAIN + BF16 + TP + PP + SP + SHARDED),
    "bf16, last stage": (GPT, 7, 9, PLAIN + BF16 + TP + PP + SP + SHARDED),
    "fp32, last stage": (GPT, 7, 13, PLAIN + TP + PP + SP),
    "overlap": (GPT, 0, 14, PLAIN + BF16 + TP + SHARDED + OVERLAP),
    "interleaved": (GPT, 7, 11, PLAIN + BF16 + TP + PP + SP + SHARDED + INTERLEAVED),
    "context parallel": (GPT, 0, 8, PLAIN + BF16 + CP + PP + SHARDED),
    "context parallel, fp32, last stage": (GPT, 7, 13, PLAIN + CP + TP + PP + SP + FULL),
    "context parallel, masks of documents": (GPT, 3, 22, PLAIN + BF16 + CP + TP + "--reset-attention-mask "),
    "full recomputation": (GPT, 0, 31, PLAIN + BF16 + TP + FULL),
    "unfused attention, dropout": (
        GPT,
        0,
        31,
        PLAIN + BF16 + TP + "--attention-backend local --hidden-dropout 0.1 --attention-dropout 0.1 ",
    ),
    "masks of documents": (GPT, 0, 31, PLAIN + TP + "--reset-attention-mask "),
    "PLE, last stage": (
        GPT,
        7,
        13,
        PLAIN + BF16 + TP + PP + SP + SHARDED + PLE + "--per-layer-preset gemma4 ",
    ),
    "PLE, interleaved": (
        GPT,
        7,
        23,
        PLAIN + TP + PP + INTERLEAVED + PLE + "--per-layer-combination-method concat ",
    ),
    "PLE, statistics": (
        GPT,
        0,
        104,
        PLAIN
        + BF16
        + TP
        + SP
        + PLE
        + "--log-per-layer-stats --log-per-layer-gradients --per-layer-stats-interval 1 ",
    ),
    "PLE, context parallel": (GPT, 0, 52, PLAIN + BF16 + CP + TP + SP + PLE),
    "NPT, from scratch": (NPT, 7, 20, PLAIN + BF16 + TP + PP + SP + SHARDED + FROM_SCRATCH),
    "NPT, key_value": (
        NPT,
        0,
        19,
        PLAIN + BF16 + TP + SP + FROZEN + "--np-form key_value --np-target gate+up+down ",
    ),
    "NPT, curriculum": (
        NPT,
        1,
        36,
        PLAIN
        + BF16
        + TP
        + FROZEN
        + "--mode multi_layer --npt-layers all --curriculum-stages teacher:1,mixed:1,student:98 ",
    ),
    "NPT, context parallel, teacher": (
        NPT,
        1,
        35,
        PLAIN
        + BF16
        + CP
        + TP
        + FROZEN
        + "--mode multi_layer --npt-layers all --curriculum-stages teacher:1,mixed:1,student:98 "
        + "--layer-losses document ",
    ),
    "NPT, one layer": (
        NPT,
        7,
        14,
        PLAIN + BF16 + TP + PP + SP + FROZEN + "--mode single_layer --npt-layers 3 --stage1-steps 1 ",
    ),
    "NPT, recomputation": (NPT, 0, 19, PLAIN + BF16 + TP + FROZEN + FULL),
    "progressive, frozen trunk": (
        PROGRESSIVE,
        1,
        14,
        GROWN + BF16 + TP + SP + "--training-objective clm --no-qlora-enabled ",
    ),
    "progressive, context parallel": (
        PROGRESSIVE,
        1,
        38,
        GROWN + BF16 + CP + TP + SP + "--training-objective mlm --trunk-strategy qlora ",
    ),
    "progressive, LoRA": (
        PROGRESSIVE,
        1,
        38,
        GROWN + BF16 + TP + SP + "--training-objective mlm --trunk-strategy qlora ",
    ),
    "progressive, diffusion": (
        PROGRESSIVE,
        7,
        6,
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
