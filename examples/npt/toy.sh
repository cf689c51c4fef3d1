#!/usr/bin/env bash
# NPT as in documents 000 and 001 (docs/design), on two CPU cores and real text. Pretrains a small Llama-style model, converts
# it to Hugging Face's format and back, converts its upper half to NPT, trains it layer by layer (000), then jointly with a
# curriculum (001), and evaluates it. `make npt` converts a real pretrained model.
#
#     bash examples/npt/toy.sh [DIRECTORY]        `make npt-toy` does this; under six minutes
#
# Data and tokenizer come from the directory of `make quickstart` (QUICKSTART) if they exist, else they are made.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/npt_toy}
. examples/common.sh
fresh_directory "$out" pretrained
find_or_make_data "$out"

batches=(--micro-batch-size 8 --global-batch-size 16 --data-path "$data/train_text_document" --split 97,2,1
    --num-workers 0 --data-cache-path "$out/cache" --log-interval 20)

echo "== 1. Pretrain a base model of six layers with Llama's architecture"
run "${torchrun[@]}" pretrain_gpt_per_layer.py --num-layers 6 --hidden-size 192 --num-attention-heads 6 \
    --seq-length 256 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights \
    --hidden-dropout 0 --attention-dropout 0 --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model "$data/tokenizer/tokenizer.json" "${batches[@]}" --train-iters 220 --eval-interval 1000 \
    --eval-iters 4 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 \
    --adam-beta2 0.95 --save "$out/pretrained"

echo "== 2. Export it to Hugging Face's format and import it, as with any Llama model"
run "$python" tools/convert_checkpoint.py export --load "$out/pretrained" --model-dir "$out/llama"
run "$python" tools/convert_checkpoint.py import --model-dir "$out/llama" --save "$out/base"

np=(--npt-layers upper_half --np-form low_rank --np-target gate+up --np-rank 64 --np-residual keep)
losses=(--direct-mlp-weight 1 --fidelity-weight 1 --regularization-weight 0 --npt-log-interval 10)
schedule=(--min-lr 2e-4 --lr 2e-3 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0)

echo "== 3. Convert the upper half of its layers to NPT, one after the other"
run "${torchrun[@]}" pretrain_npt.py --mode sequential --load "$out/base" "${np[@]}" "${losses[@]}" "${schedule[@]}" \
    "${batches[@]}" --seq-length 256 --stage1-steps 0 --steps-per-layer 30 --eval-interval 1000 --eval-iters 2 \
    --checkpoint-dir "$out/sequential" --tensorboard-dir "$out/tensorboard/sequential"

echo "== 4. Train the converted layers jointly: first on the teacher's inputs, then on a blend, then on their own"
run "${torchrun[@]}" pretrain_npt.py --mode multi_layer --load "$out/base" "${np[@]}" "${losses[@]}" "${schedule[@]}" \
    "${batches[@]}" --seq-length 256 --load-npt-weights "$out/sequential/accumulated_npt_weights.pt" \
    --curriculum-stages teacher:20,mixed:30:0.5,student:50 --train-iters 100 --eval-interval 50 --eval-iters 2 \
    --save "$out/joint/checkpoints" --tensorboard-dir "$out/tensorboard/joint"

echo "== 5. Compare base and NPT on held-out text: perplexity, layers, deltas, generations"
run "${torchrun[@]}" tools/evaluate_npt.py --checkpoint "$out/joint/checkpoints" \
    --data-path "$data/held_out_text_document" --max-tokens 100000 --output "$out/evaluation_report.json" \
    --html "$out/report.html" --prompts "The function returns" "import " --max-new-tokens 32
run "$python" tools/visualize_training.py --logdir "$out/tensorboard/joint" --html "$out/training.html"

cat <<TEXT

The report, with its pictures, is $out/report.html; the curves are $out/training.html.
    .venv/bin/tensorboard --logdir $out/tensorboard    (page Custom Scalars)
TEXT
