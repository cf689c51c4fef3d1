#!/usr/bin/env bash
# `make quickstart`: pretrains a GPT with per-layer embeddings on real text, from corpus to generation, on two CPU cores
# in about five minutes. Every command is printed before it runs. All output is under runs/quickstart, or under the
# directory given as argument.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
. examples/common.sh

fresh_directory "$out" tokenizer

echo "== 1. A corpus that every machine has: CPython's documentation, docstrings and sources"
run "$python" tools/build_corpus.py --output "$out/train.jsonl" --held-out "$out/held_out.jsonl" \
    --max-bytes 8000000 --held-out-fraction 0.1

echo "== 2. A tokenizer, trained on this corpus"
run "$python" tools/train_tokenizer.py --input "$out/train.jsonl" --output-dir "$out/tokenizer" --vocab-size 4096
tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$out/tokenizer/vocab.json"
    --merge-file "$out/tokenizer/merges.txt")

echo "== 3. Indexed datasets, and per-layer ids beside the tokens"
for part in train held_out; do
    run "$python" tools/preprocess_data.py --input "$out/$part.jsonl" --output-prefix "$out/$part" \
        "${tokenizer[@]}" --append-eod
done
run "$python" tools/preprocess_per_layer_data.py --input "$out/train.jsonl" --output-prefix "$out/train" \
    --per-layer-output-prefix "$out/train_per_layer" "${tokenizer[@]}" \
    --per-layer-vocab-file "$out/per_layer_vocab.json" --per-layer-vocab-size 2000 --per-layer-strategy syntax_focus

echo "== 4. Training: two processes, tensor parallel"
train=(pretrain_gpt_per_layer.py --config examples/gpt_per_layer/quickstart.yaml "${tokenizer[@]}"
    --data-path "$out/train_text_document" --per-layer-vocab-file "$out/per_layer_vocab.json"
    --data-cache-path "$out/cache" --tensorboard-dir "$out/tensorboard" --save "$out/checkpoint")
run "${torchrun[@]}" "${train[@]}" --exit-interval 100

echo "== 5. The same run continues from its checkpoint"
run "${torchrun[@]}" "${train[@]}" --load "$out/checkpoint"

echo "== 6. Loss and perplexity on held-out text, compared with the unigram baseline (token frequencies alone)"
run "${torchrun[@]}" tools/evaluate.py --load "$out/checkpoint" --data-path "$out/held_out_text_document" \
    --unigram-from "$out/train_text_document" --output "$out/evaluation.json"

echo "== 7. A continuation of a prompt"
run "${torchrun[@]}" tools/generate.py --load "$out/checkpoint" --prompt "The function returns" --max-new-tokens 48 \
    --temperature 0.7 --top-p 0.9
echo "After so few steps the text only proves that the path works."

echo "== 8. Summary of the training"
run "$python" tools/training_summary.py --tensorboard-dir "$out/tensorboard" --evaluation "$out/evaluation.json"
cat <<TEXT

Look at the curves and the per-layer statistics:
    .venv/bin/tensorboard --logdir $out    (page Custom Scalars)
Everything is in $out.
TEXT
