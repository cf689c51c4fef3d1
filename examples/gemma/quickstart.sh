#!/usr/bin/env bash
# A small Gemma 4, per-layer embedding included, on two CPU cores and real text: pretrains it with tensor parallelism,
# exports it to Hugging Face's format, and generates with transformers, without this project.
#
#     bash examples/gemma/quickstart.sh [DIRECTORY]        `make gemma` does this; about five minutes
#
# Data and tokenizer come from the directory of `make quickstart` (QUICKSTART) if they exist, else they are made.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gemma}
steps=${STEPS:-100}
prompt=${PROMPT:-self.assertEqual(}
new_tokens=${NEW_TOKENS:-40}
. examples/common.sh
fresh_directory "$out" checkpoint
find_or_make_data "$out"

echo "== 1. Pretrain the model of examples/gemma/model.yaml: two processes, tensor parallel"
run "${torchrun[@]}" pretrain_gpt_per_layer.py --config examples/gemma/model.yaml \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer/tokenizer.json" \
    --data-path "$data/train_text_document" --data-cache-path "$out/cache" --train-iters "$steps" \
    --eval-interval 1000 --eval-iters 4 --save "$out/checkpoint" --tensorboard-dir "$out/tensorboard"

echo "== 2. Loss and perplexity on held-out text, compared with the unigram baseline (token frequencies alone)"
run "${torchrun[@]}" tools/evaluate.py --load "$out/checkpoint" --data-path "$data/held_out_text_document" \
    --max-tokens 60000 --unigram-from "$data/train_text_document" --output "$out/evaluation.json"

echo "== 3. The most likely continuation of a prompt"
run "${torchrun[@]}" tools/generate.py --load "$out/checkpoint" --prompt "$prompt" --temperature 0 \
    --max-new-tokens "$new_tokens"

echo "== 4. Export to Hugging Face's format: the model is what transformers calls Gemma 4"
run "$python" tools/convert_checkpoint.py export --load "$out/checkpoint" --model-dir "$out/hugging_face"

echo "== 5. The same continuation by transformers, in a program that needs nothing of this project"
run "$python" examples/gemma/generate.py "$out/hugging_face" --prompt "$prompt" --max-new-tokens "$new_tokens"

echo "== 6. And back: the exported directory is imported, at any parallel layout"
run "$python" tools/convert_checkpoint.py import --model-dir "$out/hugging_face" --save "$out/imported"
run "${torchrun[@]}" tools/generate.py --load "$out/imported" --pipeline-model-parallel-size 2 --prompt "$prompt" \
    --temperature 0 --max-new-tokens "$new_tokens"

cat <<TEXT

The model is $out/hugging_face, a Gemma4ForCausalLM. docs/interop.md says what else can be exported.
TEXT
