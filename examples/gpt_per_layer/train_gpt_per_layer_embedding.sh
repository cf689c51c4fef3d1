#!/usr/bin/env bash
# Large-scale per-layer GPT training with the settings of docs/design/per_layer_embedding.md (175B parameters).
#
#   bash examples/gpt_per_layer/train_gpt_per_layer_embedding.sh \
#       CHECKPOINTS LOGS VOCAB MERGES DATA PER_LAYER_VOCAB PER_LAYER_DATA [FLAGS OF pretrain_gpt_per_layer.py ...]
#
#   CHECKPOINTS      directory to save checkpoints to and to continue from
#   LOGS             directory for TensorBoard's files
#   VOCAB, MERGES    vocab.json and merges.txt of the tokenizer
#   DATA             --output-prefix of tools/preprocess_data.py, or the prefix of a dataset
#   PER_LAYER_VOCAB  --per-layer-vocab-file of tools/preprocess_per_layer_data.py
#   PER_LAYER_DATA   --per-layer-output-prefix of that tool, or the prefix of a dataset
#
# To see what the run would cost, without starting it:
#   WORLD_SIZE=1024 bash examples/gpt_per_layer/train_gpt_per_layer_embedding.sh ... --dry-run
#
# Sizes and the parallel layout are environment variables, see below. On several hosts, run the same command on each with
# NNODES and RDZV_ENDPOINT set (examples/multi_node/launch.sh), or use Slurm (examples/multi_node/slurm.sbatch).
set -euo pipefail

if [ $# -lt 7 ]; then
    sed -n 's/^# \{0,1\}//; 3,12p' "$0" >&2
    exit 2
fi
checkpoints=$1 logs=$2 vocab=$3 merges=$4 data=$5 per_layer_vocab=$6 per_layer_data=$7
shift 7
examples=$(cd "$(dirname "$0")/.." && pwd)

# The tools write PREFIX_text_document.idx; accept PREFIX as well as PREFIX_text_document.
dataset() {
    if [ ! -e "$1.idx" ] && [ -e "$1_text_document.idx" ]; then
        echo "$1_text_document"
    else
        echo "$1"
    fi
}

model=(
    --num-layers "${NUM_LAYERS:-96}"
    --hidden-size "${HIDDEN_SIZE:-12288}"
    --num-attention-heads "${NUM_ATTENTION_HEADS:-96}"
    --seq-length "${SEQ_LENGTH:-2048}"
    --position-embedding-type "${POSITION_EMBEDDING_TYPE:-learned_absolute}"
    --normalization "${NORMALIZATION:-LayerNorm}"
    --hidden-dropout 0 --attention-dropout 0
)
per_layer=(
    --use-per-layer-embedding
    ${PER_LAYER_VOCAB_SIZE:+--per-layer-vocab-size "$PER_LAYER_VOCAB_SIZE"} # default: one row per id
    --per-layer-hidden-size "${PER_LAYER_HIDDEN_SIZE:-2048}" # about a sixth of the hidden size
    --per-layer-combination-method "${PER_LAYER_COMBINATION_METHOD:-scaled_add}"
    --per-layer-gate-activation "${PER_LAYER_GATE_ACTIVATION:-silu}"
    --per-layer-strategy "${PER_LAYER_STRATEGY:-syntax_focus}"
    --per-layer-vocab-file "$per_layer_vocab"
    --per-layer-data-path "$(dataset "$per_layer_data")"
    --log-per-layer-stats --log-per-layer-gradients
    --per-layer-stats-interval "${PER_LAYER_STATS_INTERVAL:-100}"
)
tensor=${TENSOR_MODEL_PARALLEL_SIZE:-8}
pipeline=${PIPELINE_MODEL_PARALLEL_SIZE:-16}
cut=(
    --tensor-model-parallel-size "$tensor"
    --pipeline-model-parallel-size "$pipeline"
    --use-distributed-optimizer
)
[ "$tensor" -eq 1 ] || cut+=(--sequence-parallel)
[ -z "${NUM_LAYERS_PER_VIRTUAL_STAGE:-}" ] ||
    cut+=(--num-layers-per-virtual-pipeline-stage "$NUM_LAYERS_PER_VIRTUAL_STAGE")
[ -z "${RECOMPUTE_NUM_LAYERS:-}" ] ||
    cut+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers "$RECOMPUTE_NUM_LAYERS")
training=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-1536}"
    --train-iters "${TRAIN_ITERS:-95000}" # 300 billion tokens
    --eval-interval "${EVAL_INTERVAL:-1000}" --eval-iters "${EVAL_ITERS:-10}"
    --bf16
)
optimizer=(
    --lr "${LR:-6e-5}" --min-lr "${MIN_LR:-6e-6}"
    --lr-decay-style cosine --lr-warmup-fraction "${LR_WARMUP_FRACTION:-0.01}"
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
files=(
    --tokenizer-type GPT2BPETokenizer --vocab-file "$vocab" --merge-file "$merges"
    --data-path "$(dataset "$data")" --split "${SPLIT:-969,30,1}"
    --save "$checkpoints" --load "$checkpoints" --save-interval "${SAVE_INTERVAL:-1000}"
    --tensorboard-dir "$logs" --log-interval "${LOG_INTERVAL:-10}"
)

exec bash "$examples/multi_node/launch.sh" "$examples/../pretrain_gpt_per_layer.py" \
    "${model[@]}" "${per_layer[@]}" "${cut[@]}" "${training[@]}" "${optimizer[@]}" "${files[@]}" "$@"
