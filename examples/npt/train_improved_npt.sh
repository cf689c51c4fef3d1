#!/usr/bin/env bash
# Multi-layer NPT training with the curriculum and checkpoints of docs/design/npt_curriculum.md. A second call continues
# from the last checkpoint.
#
#   BASE=base_checkpoint DATA=corpus_text_document bash examples/npt/train_improved_npt.sh [FLAGS OF pretrain_npt.py ...]
#
# All output is under RUN: checkpoints/checkpoint-<step>, checkpoints/final, tensorboard. Flags override those below.
set -euo pipefail
cd "$(dirname "$0")/../.."

BASE=${BASE:-runs/npt_toy/base}           # made by `make npt-toy` or by tools/convert_checkpoint.py import
DATA=${DATA:-runs/quickstart/train_text_document}
RUN=${RUN:-experiments/npt_new_arch}
NPROC=${NPROC:-1}                     # processes on this machine, as tensor-parallel ranks
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py \
    --mode multi_layer --base-checkpoint "$BASE" --data-path "$DATA" --split 97,2,1 \
    --train_layers upper_half --np_rank 64 --np-residual keep --tensor-model-parallel-size "$NPROC" \
    --curriculum_stages teacher:200,mixed:300:0.5,student:400 --layer-weights linear \
    --max_steps 900 --batch_size 4 --learning_rate 1e-3 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0 \
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save_steps 100 --eval-interval 100 --eval-iters 4 \
    --tensorboard-dir "$RUN/tensorboard" --log-interval 10 "$@"
