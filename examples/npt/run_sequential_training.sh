#!/usr/bin/env bash
# Sequential NPT training: converts and trains one layer after the other (docs/design/npt_sequential.md).
#
#   bash examples/npt/run_sequential_training.sh [--demo] [--layers all|upper_half|0,1,2] [--steps N]
#       [--dataset small|medium|large] [FLAGS OF pretrain_npt.py ...]
#
#   --demo       train the first four layers with few steps; without BASE, make a tiny base model and data first
#   --layers     layers to train (default: all)
#   --steps      steps per layer (default: 2000); the first quarter, at most 500, is stage 1
#   --dataset    a preset of examples/npt/datasets.yaml; the variable DATA, a dataset's prefix, overrides it
#
# BASE is a checkpoint of the base model, made by `make npt-toy` or by tools/convert_checkpoint.py import. All output is under
# RUN; after an interruption, the same RUN continues.
set -euo pipefail
cd "$(dirname "$0")/../.."

demo=false layers= steps= dataset=small
flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --demo) demo=true && shift ;;
        --layers | --steps | --dataset)
            [ $# -gt 1 ] || { echo "error: $1: requires a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2" && shift 2 ;;
        *) flags+=("$1") && shift ;;
    esac
done

DATA=${DATA:-}
NPROC=${NPROC:-1}                     # processes on this machine, as tensor-parallel ranks
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

make_base() { # a tiny base model and its data, in directory $1
    [ -e "$1/text.jsonl" ] || "$PYTHON" tools/build_corpus.py --output "$1/text.jsonl" \
        --held-out "$1/held_out.jsonl" --max-bytes 1000000
    local tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$1/tokenizer/vocab.json"
        --merge-file "$1/tokenizer/merges.txt")
    [ -e "$1/tokenizer/merges.txt" ] || "$PYTHON" tools/train_tokenizer.py --input "$1/text.jsonl" \
        --output-dir "$1/tokenizer" --vocab-size 1024
    [ -e "$1/text_text_document.idx" ] || "$PYTHON" tools/preprocess_data.py --input "$1/text.jsonl" \
        --output-prefix "$1/text" "${tokenizer[@]}" --append-eod
    [ -e "$1/base/latest_checkpointed_iteration.txt" ] || "$PYTHON" pretrain_gpt_per_layer.py "${tokenizer[@]}" \
        --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --swiglu --disable-bias-linear \
        --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 8 --train-iters 40 --eval-iters 0 --lr 3e-3 \
        --log-interval 20 --num-workers 0 --data-path "$1/text_text_document" --save "$1/base"
}

settings=()
if $demo; then
    RUN=${RUN:-runs/npt_sequential_demo}
    layers=${layers:-0,1,2,3} steps=${steps:-20}
    settings=(--np-rank 16 --num-workers 0 --eval-iters 2 --log-interval 5 --save-steps 10)
    if [ -z "${BASE:-}" ]; then
        mkdir -p "$RUN"
        make_base "$RUN"
        BASE=$RUN/base DATA=${DATA:-$RUN/text_text_document}
        settings+=(--micro-batch-size 8 --split 90,10,0)
    fi
    checkpoint_dir=$RUN/sequential
else
    BASE=${BASE:-runs/npt_toy/base}
    RUN=${RUN:-experiments/sequential_checkpoint_$(date +%Y%m%d_%H%M%S)}
    layers=${layers:-all} steps=${steps:-2000}
    settings=(--split 97,2,1 --save-steps 500 --tensorboard-dir "$RUN/tensorboard")
    checkpoint_dir=$RUN
fi
stage1=$((steps / 4 < 500 ? steps / 4 : 500))
data=(--dataset-preset "$dataset")
[ -z "$DATA" ] || data=(--data-path "$DATA")

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py --mode sequential \
    --base-checkpoint "$BASE" --layers "$layers" --steps-per-layer "$steps" --stage1-steps "$stage1" \
    --tensor-model-parallel-size "$NPROC" --checkpoint-dir "$checkpoint_dir" "${data[@]}" "${settings[@]}" \
    ${flags[@]+"${flags[@]}"}
