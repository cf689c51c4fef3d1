"""Models with PLE and NPT layers are exported with code of their own; transformers computes with it what we compute."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.inference.load_model import load_model
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from tests.unit.interop.code_models import CASES, VOCAB, run_without_us, save_random
from tests.unit.interop.hf_models import alone
from tools.convert_checkpoint import main

PROMPTS = [[5, 17, 80], [3], [9, 9, 2, 41, 60, 7]]
NEW_TOKENS = 12

_IN_TRANSFORMERS = """
import torch, transformers
transformers.logging.set_verbosity_error()
inputs, out = torch.load(sys.argv[1]), {}
for name, folder in inputs["folders"].items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        logits = model(inputs["tokens"]).logits
    generated = model.generate(
        inputs["prompts"], attention_mask=inputs["mask"], max_new_tokens=inputs["new"], do_sample=False
    )
    out[name] = {"logits": logits, "tokens": generated[:, inputs["prompts"].size(1):].tolist()}
torch.save(out, sys.argv[2])
"""


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB - 1, (2, 14), generator=torch.Generator().manual_seed(3))


def _ours(path: str) -> dict[str, dict[str, Any]]:
    """Saves and exports every case; returns logits and generated tokens of the checkpoints."""
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        save = f"{path}/checkpoint_{number}"
        save_random(case, save)
        assert main(["export", "--load", save, "--model-dir", f"{path}/hf_{number}"]) == 0
        loaded = load_model(save, FAMILIES)
        batch = {"tokens": _tokens(), "position_ids": torch.arange(14).expand(2, -1)}
        inputs = auxiliary_inputs(loaded.families, batch)
        with torch.no_grad():
            logits = loaded.model(batch["tokens"], batch["position_ids"], None, auxiliary_inputs=inputs)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
        new = generate(loaded.model, loaded.families, PROMPTS, sampling, VOCAB)
        found[name] = {"logits": logits[..., :VOCAB], "tokens": new}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, dict[str, Any]]:
    return alone(_ours, str(folder))


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of transformers, in a process that cannot import our package."""
    longest = max(map(len, PROMPTS))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    inputs = {
        "folders": {name: str(folder / f"hf_{number}") for number, name in enumerate(CASES)},
        "tokens": _tokens(),
        "prompts": torch.tensor(padded),
        "mask": torch.tensor(mask),
        "new": NEW_TOKENS,
    }
    torch.save(inputs, folder / "inputs.pt")
    run_without_us(_IN_TRANSFORMERS, f"{folder}/inputs.pt", f"{folder}/out.pt", folder=folder)
    found: dict[str, dict[str, Any]] = torch.load(folder / "out.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_exported_code_computes_the_same_logits(
    name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert ours[name]["logits"].std() > 0.1
    torch.testing.assert_close(theirs[name]["logits"], ours[name]["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_from_padded_prompts_gives_the_same_tokens(
    name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert theirs[name]["tokens"] == ours[name]["tokens"]
