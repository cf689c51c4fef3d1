"""Runs the commands of docs/own_data.md, "Continue training an imported model", with less data and fewer steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from tests.unit.interop.hf_models import KINDS

ROOT = Path(__file__).parents[3]
WORDS = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "</s>": 5}
SMALLER = {"--seq-length": "16", "--train-iters": "2", "--micro-batch-size": "2"}
MORE = ("--eval-iters", "0", "--num-workers", "0")


def documented() -> list[list[str]]:
    """The words of each command of the section."""
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    section = page.split("## Continue training an imported model\n")[1].split("\n## ")[0]
    block = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    return [shlex.split(command) for command in re.sub(r"\\\n\s*", "", block).splitlines()]


def _here(words: list[str], folder: Path) -> list[str]:
    """The words with all paths in a folder, and with smaller sizes."""
    found = list(words)
    for place, word in enumerate(words):
        if re.fullmatch(r"(path/to/model|base|data|tuned|models)(/.*)?|data\.jsonl", word):
            found[place] = str(folder / word)
        if word in SMALLER:
            found[place + 1] = SMALLER[word]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model with its tokenizer, and texts."""
    path = tmp_path_factory.mktemp("documented")
    model = path / "path" / "to" / "model"
    KINDS["Gemma3"].build().save_pretrained(model)
    backend = tokenizers.Tokenizer(models.BPE(vocab=WORDS, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.save_pretrained(model)
    texts = ("ab ba cab " * (1 + number % 5) for number in range(60))
    (path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (path / "data").mkdir()
    return path


def test_each_command_ends_well_and_the_exports_load(folder: Path) -> None:
    for words in documented():
        program, *arguments = _here(words, folder)
        processes = 1
        if program == "torchrun":
            assert arguments[0] == "--nproc-per-node"
            processes, arguments = int(arguments[1]), [*arguments[2:], *MORE]
        done = run_script(*arguments, processes=processes)
        assert done.returncode == 0, (words, done.stderr)
    settings = read_run_config(str(folder / "tuned"))
    assert settings["data"]["reset_attention_mask"] and settings["adapters"]["lora_rank"] == 16
    found = {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("path/to/model", "models/base", "models/merged")
    }
    first, base, merged = (model.state_dict() for model in found.values())
    assert all(torch.equal(first[name], base[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"]
    )
    assert (folder / "models" / "peft" / "lora" / "adapter_model.safetensors").is_file()
