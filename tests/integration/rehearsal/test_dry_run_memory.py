"""The peak memory that a dry run estimates, against the rehearsed one, of ranks of eight in all model families."""

import re

import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.rehearsing.rehearsals import rehearse
from tests.integration.rehearsal.rehearsal_flags import CP, FULL, PP, SHARDED, SP, TP, needs_device

pytestmark = needs_device

GPT, NPT, PROGRESSIVE = "pretrain_gpt_per_layer.py", "pretrain_npt.py", "pretrain_progressive.py"

# A rehearsal of large tensors takes no longer than of small ones, and small ones are no measure of a real model.
_MODEL = (
    "--hidden-size 1024 --num-attention-heads 16 --num-query-groups 4 --ffn-hidden-size 2816 --seq-length 2048 "
    "--swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer "
    "--vocab-size 32000 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --bf16 "
)
# As many micro-batches as two stages have in flight, or one without stages. More make a rehearsal longer and should
# change no peak; the cases with this flag show that they do not.
MORE = "--global-batch-size 16 "
PLAIN = _MODEL + "--num-layers 8 --train-iters 100 "
GROWN = _MODEL + "--n-blocks 4 --target-stacks 2 --stack-steps 100 "
PLE = PLAIN + "--use-per-layer-embedding --per-layer-hidden-size 128 --per-layer-strategy identity "
RANK = PLAIN + "--np-rank 64 "
_GEMMA4 = (
    "--geglu --sandwich-norm --qk-layernorm --v-layernorm --softmax-scale 1 --final-logit-softcapping 30 "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --seq-length 2048 --window-size 511,0 "
    "--rotary-base 1000000 --rotary-base-local 10000 --rotary-proportion 0.25 --use-per-layer-embedding "
    "--per-layer-preset gemma4 --per-layer-hidden-size 256 --tokenizer-type NullTokenizer --lr 1e-3 --bf16 "
    "--train-iters 100 --micro-batch-size 1 "
)
GEMMA4 = _GEMMA4 + (
    "--global-batch-size 4 "
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --num-query-groups 4 --kv-channels 64 "
    "--window-attn-skip-freq 2 --kv-channels-full 128 --num-kv-shared-layers 5 --vocab-size 32000 "
    "--ffn-hidden-sizes [2816]*3+[5632]*5 "
)
E2B = _GEMMA4 + (
    "--global-batch-size 2 "  # as many micro-batches as are in flight; more would take longer only
    "--num-layers 35 --hidden-size 1536 --num-attention-heads 8 --num-query-groups 1 --kv-channels 256 "
    "--window-attn-skip-freq 5 --kv-channels-full 512 --num-kv-shared-layers 20 --vocab-size 262143 "
    "--ffn-hidden-sizes [6144]*15+[12288]*20 --tensor-model-parallel-size 4 --decoder-first-pipeline-num-layers 17 "
)
E2B_3N = (
    "--global-batch-size 2 --train-iters 100 --micro-batch-size 1 --lr 1e-3 --bf16 --seq-length 2048 "
    "--num-layers 4 --hidden-size 2048 --num-attention-heads 8 --num-query-groups 2 --kv-channels 256 "
    "--ffn-hidden-size 8192 --window-size 511,0 --window-attn-skip-freq 2 --num-kv-shared-layers 2 "
    "--geglu --sandwich-norm --qk-layernorm --v-layernorm --softmax-scale 1 --final-logit-softcapping 30 "
    "--rotary-base 1000000 --rotary-base-local 10000 --altup-streams 4 --altup-coef-clip 120 --laurel-rank 64 "
    "--mlp-activation-sparsity [0.95]*2+[0]*2 --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--use-per-layer-embedding --per-layer-preset gemma3n --per-layer-hidden-size 256 "
    "--per-layer-vocab-size 262144 --tokenizer-type NullTokenizer --vocab-size 262399 "
    "--tensor-model-parallel-size 4 "
)
"""E2B's widths in 4 of its 30 layers; the keys of the first stage's go to the second."""

INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 2 "
TEACHER = "--mode multi_layer --npt-layers all --curriculum-stages "

# The script, the rehearsed ranks (one of the first stage, one of the last), and the flags.
CASES = {
    "base model, one stage": (GPT, (0,), PLAIN + SHARDED + MORE),
    "base model": (GPT, (0, 7), PLAIN + TP + PP + SP + SHARDED + MORE),
    "documents": (GPT, (0,), PLAIN + TP + SP + "--reset-attention-mask " + MORE),
    "adapters": (GPT, (0, 7), PLAIN + TP + PP + SP + SHARDED + "--lora-rank 16 "),
    "PLE, frozen tables": (GPT, (0,), PLE + TP + SP + "--freeze-per-layer-embedding "),
    "base model, learned positions": (
        GPT,
        (0, 7),
        PLAIN + TP + PP + SP + SHARDED + "--position-embedding-type learned_absolute ",
    ),
    "PLE, one stage": (GPT, (0,), PLE + SHARDED + MORE),
    "PLE, gemma4": (GPT, (0, 7), PLE + TP + PP + SP + SHARDED + "--per-layer-preset gemma4 "),
    "PLE, gemma3n, AltUp, Laurel and sparse gates": (
        GPT,
        (0, 7),
        PLE
        + TP
        + PP
        + SP
        + SHARDED
        + "--per-layer-preset gemma3n --altup-streams 4 --laurel-rank 64 --mlp-activation-sparsity 0.95 ",
    ),
    "PLE, concat, interleaved": (
        GPT,
        (0, 7),
        PLE + TP + PP + INTERLEAVED + "--per-layer-combination-method concat " + MORE,
    ),
    "PLE, rows": (GPT, (0, 7), PLE + TP + PP + SP + SHARDED + "--per-layer-sparse "),
    "PLE, rows, undivided state": (GPT, (0,), PLE + TP + SP + "--per-layer-sparse "),
    "PLE, gated": (GPT, (0,), PLE + TP + SHARDED + "--per-layer-combination-method gated "),
    "PLE, recomputation": (GPT, (0,), PLE + TP + SP + SHARDED + FULL),
    "PLE, context parallel": (GPT, (0,), PLE + CP + TP + SP + SHARDED),
    "Gemma 4's layers, one stage": (GPT, (0,), GEMMA4 + TP + SP + SHARDED),
    "Gemma 4's layers": (GPT, (0, 7), GEMMA4 + TP + PP + SP + SHARDED + "--global-batch-size 8 "),
    "Gemma 4's layers, recomputation": (GPT, (0, 7), GEMMA4 + PP + FULL + SHARDED),
    "Gemma 4 E2B": (GPT, (0, 7), E2B + PP + SP + SHARDED),
    "Gemma 3n E2B's widths": (GPT, (0, 7), E2B_3N + PP + SP + SHARDED),
    "NPT, cross-entropy": (NPT, (0,), RANK + TP + SP + "--mode lm --npt-layers upper_half "),
    "NPT, local losses": (NPT, (0,), RANK + TP + SHARDED + MORE),
    "NPT, key_value": (
        NPT,
        (0,),
        RANK + TP + SP + "--np-form key_value --np-target gate+up+down --mode lm ",
    ),
    "NPT, outer_product": (NPT, (0,), RANK + TP + SP + "--np-form outer_product --np-target gate+up+down "),
    "NPT, trained base": (NPT, (0, 7), RANK + TP + PP + SP + SHARDED + "--no-freeze-base "),
    "NPT, fidelity": (NPT, (0,), RANK + TP + TEACHER + "student:100 "),
    "NPT, teacher inputs": (NPT, (0,), RANK + TP + TEACHER + "teacher:100 "),
    "NPT, teacher inputs, two stages": (NPT, (0, 7), RANK + TP + PP + SP + TEACHER + "mixed:100 "),
    "NPT, losses of the documents": (
        NPT,
        (0,),
        RANK + TP + TEACHER + "student:100 --layer-losses document --fidelity-loss mse ",
    ),
    "NPT, layer-parallel": (NPT, (0,), RANK + TP + "--mode layer_parallel --npt-layers all "),
    "NPT, recomputation": (NPT, (0,), RANK + TP + FULL + "--mode lm "),
    "progressive, frozen trunk": (
        PROGRESSIVE,
        (0,),
        GROWN + TP + SP + "--training-objective clm --no-qlora-enabled ",
    ),
    "progressive, LoRA": (
        PROGRESSIVE,
        (0,),
        GROWN + TP + SP + "--training-objective mlm --trunk-strategy qlora ",
    ),
    "progressive, prepended": (
        PROGRESSIVE,
        (0, 7),
        GROWN
        + TP
        + PP
        + SP
        + "--training-objective diffusion --time-interpretation input --building-mode prepend ",
    ),
}

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def estimated(script: str, flags: str) -> dict[int, float]:
    """The estimated peak of each stage, as a dry run prints it."""
    done = run_script(script, *flags.split(), "--dry-run", "--world-size", "8")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d+)(?:-(\d+))? .* ([\d.,]+) ([KMG]?i?B) *$", done.stdout, re.MULTILINE)
    return {
        stage: float(number.replace(",", "")) * _UNITS[unit]
        for first, last, number, unit in rows
        for stage in range(int(first), int(last or first) + 1)
    }


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_dry_run_is_within_5_percent_of_the_rehearsed(case: str) -> None:
    script, ranks, flags = CASES[case]
    of_stages = estimated(script, flags)
    for rank in ranks:
        rehearsed = rehearse(script, *flags.split(), processes=8, rank=rank)
        assert rehearsed.error is None
        stage = len(of_stages) - 1 if rank else 0
        assert of_stages[stage] == pytest.approx(rehearsed.peak.size, rel=0.05)
