#!/usr/bin/env bash
# Compares per-layer embedding, after the same steps on the same tokens, with base models: the plain one, one of equal
# FLOPs, and two of equal parameters. One of these spends them in its MLP, the other in a table as PLE does. Three seeds.
#
#     make quickstart && bash examples/gpt_per_layer/compare_with_base.sh
#
# Uses the data of the quickstart, or of the given directory. A second call replaces the results of the first.
# Two runs at a time, one core each: 44 minutes of processor time in all.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-runs/quickstart}
out=${OUT:-runs/compare_with_base}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
steps=${TRAIN_ITERS:-400}
seeds=${SEEDS:-1 2 3}
export OMP_NUM_THREADS=1
[ -f "$data/train_text_document.idx" ] || { echo "error: $data/train_text_document.idx: missing; run make quickstart" >&2; exit 2; }
mkdir -p "$out"

# 003: the settings of docs/design/per_layer_embedding.md; gemma4: those of Gemma 4. The others are base models. The MLP of
# the plain one is 320 wide. A width of 352 adds the FLOPs that each PLE model adds, and 694 the parameters that gemma4 adds.
# A separate output layer (untied) makes the embedding a mere table: 524k more parameters, no more FLOPs.
# compare_ngrams.sh gives other names and another model: NAME@STEPS trains the variant NAME for another number of steps.
model=${MODEL:---num-layers 4 --hidden-size 128 --num-attention-heads 4 --per-layer-hidden-size 32}
hashed="--use-per-layer-embedding --per-layer-vocab-size 262144 --per-layer-sparse"
names=${NAMES:-base base-flops base-untied base-parameters 003 gemma4}
declare -A variant=(
    [base]=""
    [base-flops]="--ffn-hidden-size 352"
    [base-untied]="--untie-embeddings-and-output-weights"
    [base-parameters]="--ffn-hidden-size 694"
    [003]="--use-per-layer-embedding --per-layer-vocab-file $data/per_layer_vocab.json"
    [gemma4]="--use-per-layer-embedding --per-layer-preset gemma4"
    [identity]="--use-per-layer-embedding --per-layer-strategy identity"
    [bigram_hash]="$hashed --per-layer-strategy bigram_hash"
    [trigram_hash]="$hashed --per-layer-strategy trigram_hash"
)

train_and_evaluate() { # name or name@steps, seed
    local run="$out/$1-$2" name=${1%@*} own_steps=$steps
    [ "$name" = "$1" ] || own_steps=${1#*@}
    # shellcheck disable=SC2086  # the variant and the model are several words
    "$python" pretrain_gpt_per_layer.py ${variant[$name]} $model --seq-length 128 --swiglu --disable-bias-linear \
        --hidden-dropout 0 --attention-dropout 0 \
        --micro-batch-size 16 --train-iters "$own_steps" --eval-iters 0 --seed "$2" --lr 3e-3 --min-lr 3e-4 \
        --lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.1 --adam-beta2 0.95 --num-workers 0 \
        --tokenizer-type GPT2BPETokenizer --vocab-file "$data/tokenizer/vocab.json" \
        --merge-file "$data/tokenizer/merges.txt" --data-path "$data/train_text_document" --split 100,0,0 \
        --data-cache-path "$out/cache" --save "$run" --overwrite-checkpoints --device-peak-tflops 0.1 >"$run.log" 2>&1
    "$python" tools/evaluate.py --load "$run" --data-path "$data/held_out_text_document" --micro-batch-size 16 \
        --output "$run.json" >>"$run.log" 2>&1
}

for seed in $seeds; do
    for name in $names; do
        while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
        train_and_evaluate "$name" "$seed" &
    done
done
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n; done

OUT="$out" SEEDS="$seeds" NAMES="$names" "$python" - <<'TABLE'
import json
import os
import re
import statistics
from pathlib import Path

out, seeds = Path(os.environ["OUT"]), os.environ["SEEDS"].split()
print("| model | held-out loss, mean over seeds | loss of each seed | perplexity | ms/step |")
print("|---|---|---|---|---|")
for name in os.environ["NAMES"].split():
    losses = [next(iter(json.loads((out / f"{name}-{seed}.json").read_text()).values()))["loss"] for seed in seeds]
    logs = [(out / f"{name}-{seed}.log").read_text() for seed in seeds]
    times = [float(value) for log in logs for value in re.findall(r"ms/step (\S+)", log)[1:]]
    mean = statistics.mean(losses)
    each = ", ".join(f"{loss:.4f}" for loss in losses)
    print(f"| {name} | {mean:.4f} | {each} | {2.718281828**mean:.2f} | {statistics.median(times):.0f} |")
TABLE
