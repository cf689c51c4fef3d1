"""Flags of the small model that the rehearsals of the tests run, and why they may be skipped."""

import pytest

from megatron_ext.rehearsal.simulated import device_library

_REASON = device_library.why_not()
needs_device = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

_MODEL = (
    "--hidden-size 64 --num-attention-heads 8 --num-query-groups 4 --seq-length 64 --swiglu --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --normalization RMSNorm --position-embedding-type rope "
    "--tokenizer-type NullTokenizer --vocab-size 1000 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 "
)
PLAIN = _MODEL + "--num-layers 4 --train-iters 100 "
GROWN = _MODEL + "--n-blocks 2 --target-stacks 2 --stack-steps 100 "
PLE = "--use-per-layer-embedding --per-layer-hidden-size 16 --per-layer-strategy identity "
TP, PP, SP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 ", "--sequence-parallel "
CP = "--context-parallel-size 2 "
SHARDED = "--use-distributed-optimizer "
INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 1 "
OVERLAPPED = INTERLEAVED + "--overlap-p2p-communication "
OVERLAP = "--overlap-grad-reduce --overlap-param-gather "
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
