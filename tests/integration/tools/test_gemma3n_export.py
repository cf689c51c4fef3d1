"""Gemma 3n through the scripts: trained from scratch, then read by transformers; E2B in a dry run."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.interop.formats.per_layer_layout import family_of
from megatron_ext.interop.hf_import import model_flags
from megatron_ext.testing.forked_scripts import run_script
from tests.unit.interop.hf_models import alone, logits_of
from tests.unit.interop.imported_models import exported_and_generated
from tests.unit.interop.test_gemma3n import E2B, SHAPES, imported

SCRIPT = "pretrain_gpt_per_layer.py"
RUN = (
    "--mock-data --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-2 --eval-iters 0 --save-interval 2 "
    "--seed 3 --pipeline-model-parallel-size 2"
)
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 --seq-length 48 "
    "--window-size 9,0 --window-attn-skip-freq 2 --num-kv-shared-layers 2 --ffn-hidden-sizes [96]*2+[64]*2 --geglu "
    "--mlp-activation-sparsity [0.7]*2+[0]*2 --altup-streams 4 --altup-coef-clip 120 --laurel-rank 6 --sandwich-norm "
    "--qk-layernorm --v-layernorm --softmax-scale 1 --embedding-multiplier 5.656854249492381 "
    "--final-logit-softcapping 30 --rotary-base-local 100 --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 --norm-epsilon 1e-6 --init-method-std 0.1 "
    "--use-per-layer-embedding --per-layer-preset gemma3n --per-layer-hidden-size 16 --per-layer-vocab-size 90 "
    "--tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 1 "
)
NEW_TOKENS = 40


def test_a_model_of_ones_own_trained_on_two_stages_is_read_by_transformers(tmp_path: Path) -> None:
    save, target = str(tmp_path / "run"), str(tmp_path / "exported")
    done = run_script(SCRIPT, *MODEL.split(), *RUN.split(), "--save", save, processes=2)
    assert done.returncode == 0, done.stderr
    logits, new = alone(exported_and_generated, save, target, NEW_TOKENS)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()), found
    assert type(model).__name__ == "Gemma3nForCausalLM"
    expected = logits_of(model.eval())
    torch.testing.assert_close(logits[..., : expected.size(-1)], expected, atol=1e-5, rtol=0)
    whole = model.generate(
        torch.tensor([[70, 71]]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    assert new == whole[0, 2:].tolist()


def test_a_dry_run_of_the_true_e2b_on_four_tensor_ranks_and_two_stages(tmp_path: Path) -> None:
    source = imported(transformers.Gemma3nTextConfig(**E2B))
    assert source.per_layer is not None
    settings = family_of(source.per_layer, source.vocab_size)["settings"]
    # The tokenizer's ids, and the end of a document.
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=source.vocab_size - 1)
    text = model_flags(source.model, tokenizer, per_layer=settings)
    (tmp_path / "model.yaml").write_text(text)
    words = (
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel --bf16 "
        "--use-distributed-optimizer --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-4 --mock-data "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --world-size 8 --dry-run"
    )
    done = run_script(SCRIPT, "--config", str(tmp_path / "model.yaml"), *words.split())
    assert done.returncode == 0, done.stderr
    counts = {
        row[1]: int(row[2].replace(",", ""))
        for row in re.finditer(r"^\s*(base|per_layer|total)\s+([\d,]+)", done.stdout, re.MULTILINE)
    }
    _, total, _ = SHAPES["E2B"]
    assert counts["total"] == counts["base"] + counts["per_layer"] == total
