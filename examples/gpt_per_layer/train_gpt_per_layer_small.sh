#!/usr/bin/env bash
# A small per-layer GPT for development, on a CPU or one GPU (the test settings of docs/design/per_layer_embedding.md).
#
#   bash examples/gpt_per_layer/train_gpt_per_layer_small.sh [FLAGS OF pretrain_gpt_per_layer.py ...]
#
# All output is under OUT. It trains on INPUT, JSON lines of {"text": ...}; by default on a corpus of CPython's
# documentation and sources. Existing data is reused, and a second call continues from the checkpoint of the first.
# Flags on the command line override those below.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/gpt_per_layer_small}
INPUT=${INPUT:-}
NPROC=${NPROC:-1}                     # processes on this machine, as tensor-parallel ranks
VOCAB_SIZE=${VOCAB_SIZE:-8192}
NUM_LAYERS=${NUM_LAYERS:-4}
HIDDEN_SIZE=${HIDDEN_SIZE:-256}
NUM_ATTENTION_HEADS=${NUM_ATTENTION_HEADS:-4}
SEQ_LENGTH=${SEQ_LENGTH:-256}
PER_LAYER_VOCAB_SIZE=${PER_LAYER_VOCAB_SIZE:-5000}
PER_LAYER_HIDDEN_SIZE=${PER_LAYER_HIDDEN_SIZE:-256}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
TRAIN_ITERS=${TRAIN_ITERS:-200}
CORPUS_BYTES=${CORPUS_BYTES:-8000000} # size of the corpus if INPUT is not given
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# A single process uses all cores; several processes get one each.
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

mkdir -p "$OUT"
tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/tokenizer/vocab.json"
    --merge-file "$OUT/tokenizer/merges.txt")

if [ -z "$INPUT" ]; then
    INPUT=$OUT/train.jsonl
    [ -e "$INPUT" ] || run "$PYTHON" tools/build_corpus.py --output "$INPUT" --held-out "$OUT/held_out.jsonl" \
        --max-bytes "$CORPUS_BYTES"
fi
[ -e "$OUT/tokenizer/merges.txt" ] || run "$PYTHON" tools/train_tokenizer.py --input "$INPUT" \
    --output-dir "$OUT/tokenizer" --vocab-size "$VOCAB_SIZE"
[ -e "$OUT/my_data_text_document.idx" ] || run "$PYTHON" tools/preprocess_data.py --input "$INPUT" \
    --output-prefix "$OUT/my_data" "${tokenizer[@]}" --append-eod
[ -e "$OUT/my_data_per_layer_text_document.idx" ] || run "$PYTHON" tools/preprocess_per_layer_data.py \
    --input "$INPUT" --output-prefix "$OUT/my_data" --per-layer-output-prefix "$OUT/my_data_per_layer" \
    "${tokenizer[@]}" --per-layer-vocab-file "$OUT/per_layer_vocab.json" \
    --per-layer-vocab-size "$PER_LAYER_VOCAB_SIZE" --per-layer-strategy syntax_focus

run "$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" --log-dir "$OUT/torchrun" \
    pretrain_gpt_per_layer.py \
    --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_ATTENTION_HEADS" \
    --seq-length "$SEQ_LENGTH" --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 \
    --use-per-layer-embedding --per-layer-hidden-size "$PER_LAYER_HIDDEN_SIZE" --per-layer-strategy syntax_focus \
    --per-layer-vocab-file "$OUT/per_layer_vocab.json" \
    --per-layer-data-path "$OUT/my_data_per_layer_text_document" \
    --log-per-layer-stats --log-per-layer-gradients --per-layer-stats-interval 100 \
    "${tokenizer[@]}" --data-path "$OUT/my_data_text_document" --split 97,2,1 --data-cache-path "$OUT/cache" \
    --tensor-model-parallel-size "$NPROC" \
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" \
    --train-iters "$TRAIN_ITERS" --eval-interval 100 --eval-iters 4 \
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 --adam-beta2 0.95 \
    --save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval 100 \
    --tensorboard-dir "$OUT/tensorboard" --log-interval 10 "$@"
