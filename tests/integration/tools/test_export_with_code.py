"""Models with PLE and NPT layers are exported with code of their own; transformers computes with it what we compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_ext.data.per_layer.per_layer_ids import document_ids
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.inference.load_model import load_model
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from tests.unit.interop.code_models import CASES, EOD, VOCAB, run_without_us, save_random
from tests.unit.interop.hf_models import alone
from tools.convert_checkpoint import main

PROMPTS = [[5, 17, 80], [3], [9, 9, 2, 41, 60, 7]]
NEW_TOKENS = 12
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0, stop_tokens=(EOD,))

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
        inputs["prompts"], attention_mask=inputs["mask"], max_new_tokens=inputs["new"],
        do_sample=False, eos_token_id=inputs["end"], pad_token_id=0,
    )
    rows = generated[:, inputs["prompts"].size(1):].tolist()
    rows = [row[:row.index(inputs["end"])] if inputs["end"] in row else row for row in rows]
    out[name] = {"logits": logits, "tokens": rows}
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
        new = generate(loaded.model, loaded.families, PROMPTS, GREEDY, VOCAB)
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
        "end": EOD,
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


def _again(path: str) -> dict[str, list[list[int]]]:
    """Imports every exported directory, exports it again, and generates with the imported checkpoint."""
    found = {}
    for number, name in enumerate(CASES):
        save = f"{path}/imported_{number}"
        assert main(["import", "--model-dir", f"{path}/hf_{number}", "--save", save]) == 0
        assert main(["export", "--load", save, "--model-dir", f"{path}/again_{number}"]) == 0
        loaded = load_model(save, FAMILIES)
        found[name] = generate(loaded.model, loaded.families, PROMPTS, GREEDY, VOCAB)
    return found


def test_an_exported_directory_comes_back_to_the_bit_and_generates(
    folder: Path, ours: dict[str, Any]
) -> None:
    generated = alone(_again, str(folder))
    for number, name in enumerate(CASES):
        before, after = folder / f"hf_{number}", folder / f"again_{number}"
        assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes(), name
        configs = [json.loads((place / "config.json").read_text()) for place in (before, after)]
        assert configs[0] == configs[1], name
        assert generated[name] == ours[name]["tokens"], name


_FURTHER = """
import torch, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoModelForCausalLM
for folder in sys.argv[3:]:
    options = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    tokens = torch.load(sys.argv[1])
    # Forward passes with a cache, in pieces.
    whole, cache, pieces = model(tokens).logits, None, []
    for piece in tokens.split(5, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    # Hidden states, and the gradients with and without checkpointing.
    assert len(model(tokens, output_hidden_states=True).hidden_states) == model.config.num_hidden_layers + 1
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
    # Saved by transformers, and read again.
    model.eval().save_pretrained(folder + "-saved")
    again = AutoModelForCausalLM.from_pretrained(folder + "-saved", **options)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    assert torch.isfinite(half(tokens).logits).all()
    beams = model.generate(tokens[:, :4], max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.shape == (2, 10)
    options_of_beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "use_cache": False}
    assert torch.equal(beams, model.generate(tokens[:, :4], **options_of_beams))
    made = AutoModelForCausalLM.from_config(model.config, **options)
    assert torch.isfinite(made(tokens).logits).all()
"""


def test_a_cache_gradients_checkpointing_beams_and_save_pretrained_work(
    folder: Path, ours: dict[str, Any]
) -> None:
    names = (
        "PLE attention_guidance",
        "PLE gemma4",
        "PLE trigram_hash",
        "PLE and NPT",
        "NPT key_value triple, ranks of layers",
    )
    chosen = [f"{folder}/hf_{list(CASES).index(name)}" for name in names]
    tokens = _tokens()
    tokens[0, 4] = tokens[1, 2] = EOD
    torch.save(tokens, folder / "tokens.pt")
    run_without_us(_FURTHER, f"{folder}/tokens.pt", "-", *chosen, folder=folder)


_DOCUMENTS = """
import torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
given = []
model.model.layers[0].register_forward_pre_hook(lambda _, __, kw: given.append(kw["per_layer"][1]), with_kwargs=True)
for tokens, mask in torch.load(sys.argv[2]):
    model(tokens, attention_mask=mask)
cache = transformers.DynamicCache(config=model.config)
tokens, _ = torch.load(sys.argv[2])[0]
for place in range(tokens.size(1)):
    model(tokens[:, place:place + 1], past_key_values=cache, use_cache=True)
torch.save([*given[:2], torch.cat(given[2:], dim=1)], sys.argv[3])
"""


def test_ids_of_attention_guidance_follow_documents_padding_and_the_cache(
    folder: Path, ours: dict[str, Any]
) -> None:
    family: Any = CASES["PLE attention_guidance"].families()[0]
    documents = [[*range(1, 25), EOD], [7, 8, 9, EOD], list(range(30, 42))]
    expected = [
        document_ids(np.array(document), family.table.numpy(), "attention_guidance", eod=EOD)
        for document in documents
    ]
    tokens = torch.tensor([[token for document in documents for token in document]])
    wanted = torch.from_numpy(np.concatenate(expected)).unsqueeze(0)
    assert len(set(wanted[0].tolist()) & {2, 3, 4}) == 3
    # The padding is the end token, as it often is.
    padded, mask = F.pad(tokens, (6, 0), value=EOD), F.pad(torch.ones_like(tokens), (6, 0))
    torch.save([(tokens, None), (padded, mask)], folder / "documents.pt")
    place = f"{folder}/hf_{list(CASES).index('PLE attention_guidance')}"
    run_without_us(_DOCUMENTS, place, f"{folder}/documents.pt", f"{folder}/ids.pt", folder=folder)
    plain, after_padding, by_token = torch.load(folder / "ids.pt", weights_only=True)
    assert torch.equal(plain.long(), wanted.long())
    assert torch.equal(after_padding[:, 6:].long(), wanted.long())
    assert torch.equal(by_token.long(), wanted.long())


def test_without_its_code_the_directory_is_no_other_model(folder: Path, ours: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code|megatron_ext_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(folder / "hf_0", trust_remote_code=False)
