#!/usr/bin/env bash
# Compares per-layer tables of hashed n-grams with tables of token ids and with the plain base model, with three seeds:
# first after equal steps, then after the time that the slowest of them took.
#
#     make quickstart && bash examples/gpt_per_layer/compare_ngrams.sh
#     TRAIN_ITERS=800 bash examples/gpt_per_layer/compare_ngrams.sh runs/documentation
#
# If runs/documentation does not exist, the second command makes it, from manuals of the Debian packages that
# documentation_corpus.py names. A second call replaces the results of the first. Two runs at a time, one core each.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-runs/quickstart}
export OUT=${OUT:-runs/compare_ngrams_$(basename "$data")}
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export TRAIN_ITERS=${TRAIN_ITERS:-300}
# A layer's table of 262,144 rows has 4.2M parameters; the base model has 0.5M in all.
export MODEL="--num-layers 4 --hidden-size 64 --num-attention-heads 4 --per-layer-hidden-size 16"
mkdir -p "$OUT"

if [ "$data" = runs/documentation ] && [ ! -e "$data" ]; then
    new=$data.new
    mkdir -p "$new"
    "$PYTHON" examples/gpt_per_layer/documentation_corpus.py --output "$new/train.jsonl" --held-out "$new/held_out.jsonl"
    awk 'NR % 20 == 0' "$new/train.jsonl" >"$new/sample.jsonl"
    "$PYTHON" tools/train_tokenizer.py --input "$new/sample.jsonl" --output-dir "$new/tokenizer" --vocab-size 4096
    for part in train held_out; do
        "$PYTHON" tools/preprocess_data.py --input "$new/$part.jsonl" --output-prefix "$new/$part" --append-eod \
            --tokenizer-type GPT2BPETokenizer --vocab-file "$new/tokenizer/vocab.json" \
            --merge-file "$new/tokenizer/merges.txt"
    done
    mv "$new" "$data"
fi

echo "after $TRAIN_ITERS steps"
NAMES="base identity bigram_hash trigram_hash" bash examples/gpt_per_layer/compare_with_base.sh "$data" |
    tee "$OUT/equal_steps.md"

# name@steps for each but the slowest: as many steps as take the time of the slowest
names=$(tail -n +3 "$OUT/equal_steps.md" | awk -F ' *[|] *' -v steps="$TRAIN_ITERS" '
    { name[NR] = $2; time[NR] = $6; if ($6 > slowest) slowest = $6 }
    END { for (i in name) if (time[i] < slowest) printf "%s@%d ", name[i], steps * slowest / time[i] + 0.5 }')
echo "after the time of the slowest"
NAMES=$names bash examples/gpt_per_layer/compare_with_base.sh "$data" | tee "$OUT/equal_time.md"
