"""Exported adapters in Hugging Face peft, over the exported base model: the same logits as ours."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop import base_state, export_hf
from megatron_ext.interop.peft_export import export_peft
from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.lora.parallel_linear import LayerSettings
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import VOCAB_SIZE
from tests.unit.progressive.progressive_helpers import DUAL, MODEL, build, logits_of, some_tokens

OTHER = replace(DUAL, adapters={"stack": AdapterShape(rank=8, alpha=3)}, trained_adapters=frozenset())
PLANS: dict[str, Mapping[int, LayerSettings]] = {
    "dual": dict.fromkeys(range(4), DUAL),
    "ranks and layers differ": {0: DUAL, 1: DUAL, 2: OTHER},
    "four bits": dict.fromkeys(range(4), replace(DUAL, precision="qlora")),
}


def write_adapters(folder: str, plan: str, parallel: ParallelConfig) -> torch.Tensor:
    """Our logits, and the adapters in files; the base too, where the model is whole."""
    chunks = build(PLANS[plan], parallel)
    for name in DUAL.adapters:
        export_peft(chunks, name, MODEL, f"{folder}/{name}", base_model=f"{folder}/base")
    if parallel == ParallelConfig():
        logits = logits_of(chunks[0])
        for _, _, linear in adapted_linears(chunks):
            linear.restore_weight()
        export_hf(MODEL, VOCAB_SIZE, base_state(chunks), f"{folder}/base")
        return logits[..., :VOCAB_SIZE]
    return torch.empty(0)


def _theirs(folder: Path, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base model, and with the adapters."""
    from transformers import AutoModelForCausalLM  # here, so that the other processes need not wait for it

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        without = base(some_tokens()).logits
    with warnings.catch_warnings():  # peft imports every quantization library that is installed
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(base, folder / adapters[0], adapter_name=adapters[0])
        for name in adapters[1:]:
            model.load_adapter(folder / name, adapter_name=name)
        model.base_model.set_adapter(adapters)
    with torch.no_grad():
        return without, model(some_tokens()).logits


@pytest.mark.parametrize("plan", PLANS)
def test_peft_gives_the_same_logits_with_both_adapters(plan: str, tmp_path: Path) -> None:
    ours = run_single(write_adapters, str(tmp_path), plan, ParallelConfig())
    without, theirs = _theirs(tmp_path, ["stack", "progressive"])
    size = float(ours.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-6 * max(1.0, size)
    assert float((ours - without).abs().max()) > 1e-2 * size


def test_the_configuration_names_layers_and_exceptions(tmp_path: Path) -> None:
    run_single(write_adapters, str(tmp_path), "ranks and layers differ", ParallelConfig())
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (4, 8, [0, 1, 2])
    assert config["rank_pattern"] == {r"model\.layers\.2\..*": 8}
    assert config["alpha_pattern"] == {r"model\.layers\.2\..*": 3}


def _mistakes(folder: str) -> list[str]:
    chunks = build(PLANS["dual"])
    Path(folder, "taken").mkdir()
    Path(folder, "taken", "file").touch()
    cases: list[tuple[str, ModelConfig, str]] = [
        ("stack", MODEL, f"{folder}/taken"),
        ("other", MODEL, f"{folder}/new"),
        ("stack", replace(MODEL, swiglu=False), f"{folder}/new"),
    ]
    messages = []
    for name, model, directory in cases:
        try:
            export_peft(chunks, name, model, directory)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    messages: Any = run_single(_mistakes, str(tmp_path))
    assert messages == [
        f"--adapter-dir {tmp_path}/taken: is not empty; give a directory that does not exist or is empty",
        "adapter other: no layer of the model has an adapter of this name",
        "the model was built with an MLP without a gate and cannot be exported; a Llama-like model requires "
        "--swiglu or --geglu",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
