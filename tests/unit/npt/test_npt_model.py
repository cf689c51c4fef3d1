"""NPT from Python: the base is transformers' model, conversion leaves it alone, weights load strictly or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt import NPTConfig, NPTLlamaModel, NPTModel
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.weights.np_factors import gather_np_factors
from megatron_ext.npt.weights.np_weight_files import write_np_weights
from tests.unit.interop.hf_models import KINDS, LENGTH, alone, logits_of, tokens

KIND = KINDS["Llama, grouped queries"]
CONFIG = {"layers_to_convert": [1, 3], "np_rank": 8, "np_init_scale": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random tiny Llama as Hugging Face saved it, and NP weights for its layers 0 to 3, rank 256."""
    path = tmp_path_factory.mktemp("api")
    KIND.build().save_pretrained(path / "llama")
    alone(_write_weights, str(path))
    return str(path)


def _write_weights(path: str) -> None:
    model = NPTModel.from_pretrained(f"{path}/llama")
    model.convert_to_npt(NPTConfig(layers_to_convert="all", np_init_scale=1.0), seed=5)
    model.save_npt_weights(f"{path}/accumulated_npt_weights.pt")


def _base(path: str) -> tuple[torch.Tensor, list[int], float, torch.Tensor]:
    model = NPTModel.from_pretrained(f"{path}/llama")
    row = tokens()[0]
    new = model.generate(row.tolist(), max_new_tokens=6, temperature=0)
    return model.logits(tokens()), new, model.loss(row.tolist()), model.logits(row)


def test_the_base_model_is_transformers_model(folder: str) -> None:
    logits, new, loss, row_logits = alone(_base, folder)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/llama")
    torch.testing.assert_close(logits, logits_of(reference), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_logits, logits[0], atol=1e-5, rtol=1e-5)
    row = tokens()[:1]
    assert loss == pytest.approx(reference(row, labels=row).loss.item(), rel=1e-5)
    generated = reference.generate(row, max_new_tokens=6, do_sample=False)
    assert new == generated[0, LENGTH:].tolist()


def _converted(path: str) -> dict[str, bool]:
    model = NPTModel.from_pretrained(f"{path}/llama")
    before = model.logits(tokens())
    model.convert_to_npt(NPTConfig(**CONFIG))  # type: ignore[arg-type]
    trained = build_model(
        model.config,
        ParallelConfig(),
        vocab_size=model.vocab_size,
        seed=1234,
        extensions=[NPTExtension(NPTConfig(**CONFIG).module)],  # type: ignore[arg-type]
    )
    ours, theirs = gather_np_factors([model.model]), gather_np_factors(trained)
    with model.deactivated():
        off = model.logits(tokens())
    with model.deactivated([1]):
        partly = model.logits(tokens())
    return {
        "layers": model.npt_layers == (1, 3),
        "off is the base": torch.equal(off, before),
        "on is not": not torch.equal(model.logits(tokens()), before),
        "one off is something else": not torch.equal(partly, before),
        "initial values of a training run": ours.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()),
    }


def test_conversion_draws_what_a_run_draws_and_deactivated_it_is_the_base_bit_for_bit(folder: str) -> None:
    found = alone(_converted, folder)
    assert all(found.values()), found


def _documents_snippet(path: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Document 000's "Model Loading", with a local directory; then three lines to a generation."""
    model = NPTLlamaModel.from_pretrained(f"{path}/llama")

    # Convert the trained layers
    npt_config = NPTConfig(
        layers_to_convert=[0, 1, 2, 3],  # Your trained layers
        np_rank=256,
        single_layer_mode=False,
    )
    model.convert_to_npt(npt_config)

    # Load accumulated weights
    weights = torch.load(f"{path}/accumulated_npt_weights.pt", weights_only=True)
    model.load_npt_weights(weights)

    other = NPTModel.from_pretrained(f"{path}/llama")
    other.load_npt_weights(f"{path}/accumulated_npt_weights.safetensors")
    text = other.generate("1 2 3", max_new_tokens=4)
    return model.logits(tokens()), other.logits(tokens()), text


def test_document_000s_snippet_loads_the_model_and_a_file_alone_does_too(folder: str) -> None:
    by_snippet, by_file, text = alone(_documents_snippet, folder)
    assert torch.equal(by_snippet, by_file)
    assert not torch.equal(by_snippet, logits_of(KIND.build()))
    assert len(text.split()) == 4


def _message(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        action(*arguments, **options)
    return str(error.value)


def _refusals(path: str) -> dict[str, str]:
    model = NPTModel.from_pretrained(f"{path}/llama")
    weights = torch.load(f"{path}/accumulated_npt_weights.pt", weights_only=True)
    unfit = Path(path, "unfit")
    unfit.mkdir()
    chosen = {key: tensor for key, tensor in weights.items() if key.startswith("layer_1_")}
    write_np_weights(unfit, chosen, NPTConfig("0,1").module)
    found = {
        "unconverted": _message(model.load_npt_weights, weights),
        "unfit file": _message(model.load_npt_weights, unfit / "npt_weights.safetensors"),
        "nothing to save": _message(model.save_npt_weights, path),
    }
    assert model.npt_layers == () and model.settings is None
    found["two layers"] = _message(model.convert_to_npt, NPTConfig("0,1", single_layer_mode=True))
    found["no such layer"] = _message(model.convert_to_npt, NPTConfig([9]))
    model.convert_to_npt(NPTConfig([0, 1], np_rank=8))
    before = gather_np_factors([model.model])
    found["twice"] = _message(model.convert_to_npt, NPTConfig())
    found["tensors"] = _message(model.load_npt_weights, weights)
    found["file"] = _message(model.load_npt_weights, f"{path}/accumulated_npt_weights.pt")
    found["one token"] = _message(model.perplexity, [1])
    after = gather_np_factors([model.model])
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    return found


def test_what_does_not_fit_is_refused_with_the_differences_and_changes_nothing(folder: str) -> None:
    found = alone(_refusals, folder)
    assert found["unconverted"] == (
        "load_npt_weights: no layer is converted, and the weights have no configuration; call convert_to_npt first"
    )
    assert "missing: layer_0_np.gate" in found["unfit file"] and "unknown" not in found["unfit file"]
    assert "no layer is converted" in found["nothing to save"]
    assert found["two layers"] == "NPTConfig: single_layer_mode requires one layer, not 2"
    assert "--npt-layers 9: out of range or empty; the model has layers 0 to 3" in found["no such layer"]
    assert found["twice"] == "convert_to_npt: layers (0, 1) are already converted; load the model again"
    assert (
        "unknown: layer_2_np.gate" in found["tensors"] and "of the wrong shape: layer_0" in found["tensors"]
    )
    assert "np_rank was 256, now 8" in found["file"]
    assert found["one token"] == "loss: requires at least two tokens, got 1"


def test_a_configuration_that_cannot_be_is_refused() -> None:
    assert "unknown setting rank=3" in _message(NPTConfig, [0], rank=3)
    assert "single_layer_mode requires np_form='outer_product'" in _message(
        NPTConfig, [0], single_layer_mode=True, np_form="low_rank"
    )


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = _message(NPTModel.from_pretrained, "meta-llama/Llama-3.2-1B")
    assert missing == "meta-llama/Llama-3.2-1B: no such directory; models are not downloaded"
    assert str(tmp_path) in _message(NPTModel.from_pretrained, tmp_path)
