"""A rack from the command line to Hugging Face: merged, and as peft adapters, with logits equal to the rack's."""

import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.inference.load_model import load_model
from megatron_ext.platform import process_groups
from megatron_ext.progressive.rack_export import check_plain
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.run_single import run_single
from tests.integration.progressive.progressive_run_helpers import VOCABULARY, train, write_data
from tools.convert_checkpoint import main

LLAMA = shlex.split(
    "--position-embedding-type rope --normalization RMSNorm --stack-steps 2 --target-stacks 2"
)
RACKS = {
    "four bits": ("--new-stack-precision", "qlora", "nvfp4", "--trunk-strategy", "qlora", "--lr", "3e-2"),
    "no adapters": ("--no-enabled",),
}


def some_tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def rack_logits(load: str) -> torch.Tensor:
    loaded = load_model(load, FAMILIES)
    tokens = some_tokens()
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(tokens, torch.arange(16).expand_as(tokens), None)
    return logits[..., :VOCABULARY]


def message_of(*argv: str) -> str:
    with pytest.raises(ValueError, match="--") as error:
        main(["export", *argv])
    return str(error.value)


def exports(folder: str) -> dict[str, Any]:
    """Trains each rack, exports it in all ways, and notes our logits and what is refused."""
    process_groups.shutdown = lambda: None
    data = write_data(Path(folder))
    found: dict[str, Any] = {}
    for name, flags in RACKS.items():
        train(data, f"{folder}/{name}", *LLAMA, *flags)
        rack = f"{folder}/{name}/progressive_rack"
        found[name] = rack_logits(rack)
        main(["export", "--load", rack, "--model-dir", f"{folder}/{name} merged", "--merge-adapters"])
        if name != "no adapters":
            flags = ("--adapter-dir", f"{folder}/{name} peft")
            main(["export", "--load", rack, "--model-dir", f"{folder}/{name} base", *flags])
    out = ("--model-dir", f"{folder}/out")
    rack = f"{folder}/four bits/progressive_rack"
    found["told"] = {
        "none": message_of(
            "--load", f"{folder}/no adapters/progressive_rack", *out, "--adapter-dir", f"{folder}/x"
        ),
        "plain": message_of("--load", rack, *out),
        "taken": message_of("--load", rack, *out, "--adapter-dir", f"{folder}/four bits peft"),
    }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_single(exports, str(folder))


def test_the_merged_model_has_the_racks_logits(found: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM  # here, so that the other process need not wait for it

    for name in RACKS:
        model = AutoModelForCausalLM.from_pretrained(folder / f"{name} merged", dtype=torch.float32)
        with torch.no_grad():
            theirs = model(some_tokens()).logits[..., :VOCABULARY]
        assert float((theirs - found[name]).abs().max()) < 1e-5, name


def test_peft_puts_the_exported_adapters_on_the_exported_base(found: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "four bits base", dtype=torch.float32)
    with torch.no_grad():
        plain = base(some_tokens()).logits[..., :VOCABULARY]
    names = sorted(path.name for path in (folder / "four bits peft").iterdir())
    assert names == ["progressive", "stack"]
    with warnings.catch_warnings():  # peft imports every quantization library that is installed
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        folders = [folder / "four bits peft" / name for name in names]
        model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        model.load_adapter(folders[1], adapter_name=names[1])
        model.base_model.set_adapter(names)
    with torch.no_grad():
        theirs = model(some_tokens()).logits[..., :VOCABULARY]
    assert float((theirs - found["four bits"]).abs().max()) < 1e-5
    assert float((plain - found["four bits"]).abs().max()) > 1e-2


def test_what_no_llama_is_and_what_is_not_there_is_refused(found: dict[str, Any], folder: Path) -> None:
    told = found["told"]
    config, out = ProgressiveConfig(max_stacks=2), folder / "out"
    with pytest.raises(ValueError, match="--training-objective mlm cannot be exported: its attention"):
        check_plain(config, {}, as_adapters=False)
    assert "--adapter-dir: requires a model with adapters" in told["none"]
    assert "--merge-adapters" in told["plain"]
    assert "four bits peft: is not empty" in told["taken"]
    assert not out.exists() and not (folder / "x").exists()
