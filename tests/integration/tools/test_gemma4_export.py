"""Gemma 4 through the scripts: trained from scratch or from an import, then read by transformers; E2B in a dry run."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.interop.formats.per_layer_layout import family_of
from megatron_ext.interop.hf_import import model_flags
from megatron_ext.testing.forked_scripts import run_script
from tests.unit.interop.hf_models import KINDS, alone, logits_of, tensors_in
from tests.unit.interop.imported_models import exported_and_generated
from tests.unit.interop.test_gemma4 import E2B, imported
from tools.convert_checkpoint import main

SCRIPT = "pretrain_gpt_per_layer.py"
RUN = (
    "--mock-data --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-2 --eval-iters 0 --save-interval 2 "
    "--seed 3 "
)
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 --seq-length 48 "
    "--window-size 9,0 --window-attn-skip-freq 2 --kv-channels-full 16 --num-kv-shared-layers 2 "
    "--ffn-hidden-sizes [48]*2+[96]*2 --geglu --sandwich-norm --qk-layernorm --v-layernorm --softmax-scale 1 "
    "--embedding-multiplier 5.656854249492381 --final-logit-softcapping 4 --rotary-base-local 100 "
    "--rotary-proportion 0.25 --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --norm-epsilon 1e-6 "
    "--init-method-std 0.1 "
    "--use-per-layer-embedding --per-layer-preset gemma4 --per-layer-hidden-size 16 "
    "--tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 1 "
)
NEW_TOKENS = 40


def _train(*flags: str) -> None:
    done = run_script(SCRIPT, *flags, *RUN.split(), "--pipeline-model-parallel-size", "2", processes=2)
    assert done.returncode == 0, done.stderr


def _check(load: Path, target: Path) -> None:
    logits, new = alone(exported_and_generated, str(load), str(target), NEW_TOKENS)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()), found
    assert type(model).__name__ == "Gemma4ForCausalLM"
    expected = logits_of(model.eval())
    torch.testing.assert_close(logits[..., : expected.size(-1)], expected, atol=1e-5, rtol=0)
    prompt = torch.tensor([[70, 71]])
    whole = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert new == whole[0, 2:].tolist()


def test_a_model_of_ones_own_trained_on_two_stages_is_read_by_transformers(tmp_path: Path) -> None:
    _train(*MODEL.split(), "--save", str(tmp_path / "run"))
    _check(tmp_path / "run", tmp_path / "exported")


def test_an_imported_model_trains_on_and_is_read_by_transformers(tmp_path: Path) -> None:
    KINDS["Gemma4"].build().save_pretrained(tmp_path / "hf")
    words = ["import", "--model-dir", str(tmp_path / "hf"), "--save", str(tmp_path / "checkpoint")]
    assert alone(main, words) == 0
    load, config = str(tmp_path / "checkpoint"), str(tmp_path / "checkpoint" / "model.yaml")
    _train("--config", config, "--load", load, "--finetune", "--save", str(tmp_path / "run"))
    _check(tmp_path / "run", tmp_path / "exported")
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.endswith("layer_scalar"), name


def _as_eight() -> None:
    os.environ["WORLD_SIZE"] = "8"


@pytest.mark.parametrize(
    "recompute", [(), ("--recompute-granularity", "full", "--recompute-method", "uniform")]
)
def test_a_dry_run_of_the_true_e2b_on_four_tensor_ranks_and_two_stages(
    recompute: tuple[str, ...], tmp_path: Path
) -> None:
    source = imported(transformers.Gemma4TextConfig(**E2B))
    tokenizer = TokenizerConfig(
        tokenizer_type="NullTokenizer", vocab_size=262143
    )  # and the end of a document
    assert source.per_layer is not None
    settings = family_of(source.per_layer, source.vocab_size)["settings"]
    text = model_flags(source.model, tokenizer, per_layer=settings)
    (tmp_path / "model.yaml").write_text(text)
    words = (
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 17 "
        "--sequence-parallel --use-distributed-optimizer --bf16 --micro-batch-size 1 --global-batch-size 8 "
        "--train-iters 10 --lr 1e-4 --mock-data --dry-run"
    )
    more = ("--recompute-num-layers", "1") if recompute else ()
    done = run_script(
        SCRIPT,
        "--config",
        str(tmp_path / "model.yaml"),
        *words.split(),
        *recompute,
        *more,
        before=functools.partial(_as_eight),
    )
    assert done.returncode == 0, done.stderr
    counts = {
        row[1]: int(row[2].replace(",", ""))
        for row in re.finditer(r"^\s*(base|per_layer|total)\s+([\d,]+)", done.stdout, re.MULTILINE)
    }
    assert counts["total"] == counts["base"] + counts["per_layer"] == 4_628_569_344
    assert counts["total"] - 262144 * 35 * 256 == 2_279_759_104
