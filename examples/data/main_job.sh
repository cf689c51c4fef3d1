#!/usr/bin/env bash
# Runs the data tools on a gigabyte of real text: corpus, tokenizer, datasets, per-layer data for every strategy,
# verification, and a few training steps. Prints each command before it runs, and its time afterwards.
#
#   bash examples/data/main_job.sh
#   SIZE_GB=10 OUT=/fast/disk/job bash examples/data/main_job.sh
#
# The text is CPython's documentation and sources (13 MB), repeated to SIZE_GB. All output is under OUT and takes four
# times SIZE_GB of disk space. One GB takes about a minute of CPU time.
set -euo pipefail
cd "$(dirname "$0")/../.."

SIZE_GB=${SIZE_GB:-1}
OUT=${OUT:-runs/data_main_job}
VOCAB_SIZE=${VOCAB_SIZE:-32768}
PER_LAYER_VOCAB_SIZE=${PER_LAYER_VOCAB_SIZE:-10000}
TRAIN_ITERS=${TRAIN_ITERS:-5}
CORPUS_BYTES=${CORPUS_BYTES:-}        # size of the corpus before repetition; empty: all of it
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TIMEFORMAT='(%R s; CPU time %U s user, %S s system)'

. examples/common.sh

run() {
    echo
    print_command "$@"
    time "$@"
}

fresh_directory "$OUT" tokenizer

echo "== 1. Real text, once for the tokenizer and repeated for the rest"
limit=(${CORPUS_BYTES:+--max-bytes "$CORPUS_BYTES"})
run "$PYTHON" tools/build_corpus.py --output "$OUT/corpus.jsonl" --held-out "$OUT/held_out.jsonl" "${limit[@]}"
repeat=$("$PYTHON" -c 'import math, os, sys; print(math.ceil(float(sys.argv[1]) * 1e9 / os.path.getsize(sys.argv[2])))' \
    "$SIZE_GB" "$OUT/corpus.jsonl")
run "$PYTHON" tools/build_corpus.py --output "$OUT/train.jsonl" --held-out "$OUT/held_out.jsonl" "${limit[@]}" \
    --repeat "$repeat"
ls -l "$OUT/train.jsonl"

echo "== 2. Tokenizer"
run "$PYTHON" tools/train_tokenizer.py --input "$OUT/corpus.jsonl" --output-dir "$OUT/tokenizer" \
    --vocab-size "$VOCAB_SIZE"
tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/tokenizer/vocab.json"
    --merge-file "$OUT/tokenizer/merges.txt")

echo "== 3. Tokens"
run "$PYTHON" tools/preprocess_data.py --input "$OUT/train.jsonl" --output-prefix "$OUT/train" "${tokenizer[@]}" \
    --append-eod

echo "== 4. Per-layer ids, for every strategy"
datasets=("$OUT/train_text_document")
for strategy in syntax_focus semantic_focus attention_guidance random_subset identity bigram_hash trigram_hash; do
    run "$PYTHON" tools/preprocess_per_layer_data.py --input "$OUT/train.jsonl" --output-prefix "$OUT/train" \
        --per-layer-output-prefix "$OUT/$strategy" "${tokenizer[@]}" --per-layer-strategy "$strategy" \
        --per-layer-vocab-file "$OUT/per_layer_vocab.json" --per-layer-vocab-size "$PER_LAYER_VOCAB_SIZE"
    datasets+=("$OUT/${strategy}_text_document")
done

echo "== 5. Verify every pointer, id and checksum"
run "$PYTHON" tools/data.py verify "${datasets[@]}" "${tokenizer[@]}"

echo "== 6. A few training steps"
run "$PYTHON" pretrain_gpt_per_layer.py \
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --swiglu --disable-bias-linear \
    --use-per-layer-embedding --per-layer-hidden-size 32 \
    --per-layer-strategy attention_guidance --per-layer-vocab-file "$OUT/per_layer_vocab.json" \
    --per-layer-data-path "$OUT/attention_guidance_text_document" \
    "${tokenizer[@]}" --data-path "$OUT/train_text_document" --split 100,0,0 --data-cache-path "$OUT/cache" \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$TRAIN_ITERS" --eval-iters 0 --log-interval 1 --lr 1e-3 \
    "$@"
