"""The exported code, in this process, against our model: every combination of PLE's and NPT's forms."""

from typing import Any

import pytest
import torch
import transformers

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop.formats.configs.hf_config import from_model_config
from megatron_ext.interop.formats.weight_layout import entries, split
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.registry.remote_code import modeling_megatron_ext as code
from megatron_ext.registry.remote_code.family_parts import parts_of
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from tests.unit.interop.code_models import EOD, VOCAB, Case, all_forms, randomize

FORMS = all_forms()


def _errors() -> dict[str, tuple[float, float]]:
    initialize(ParallelConfig(), seed=1)
    return {name: _error(case) for name, case in FORMS.items()}


def _error(case: Case) -> tuple[float, float]:
    """The largest difference of the logits, and their standard deviation."""
    model, families = case.model, case.families()
    extensions = [family.extension() for family in families]
    chunk = build_model(model, ParallelConfig(), vocab_size=VOCAB, seed=1, extensions=extensions)[0].eval()
    randomize(chunk, case)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    batch = {"tokens": tokens, "position_ids": torch.arange(9).expand(2, -1)}
    theirs = _in_transformers(case, dict(chunk.state_dict()))
    with torch.no_grad():
        inputs = auxiliary_inputs(families, batch)
        expected = chunk(tokens, batch["position_ids"], None, auxiliary_inputs=inputs)[..., :VOCAB]
        found = theirs(tokens).logits
    return float((found - expected).abs().max()), float(expected.std())


def _in_transformers(case: Case, state: dict[str, Any]) -> Any:
    stored = {family.name: family.configuration() for family in case.families()}
    parts = parts_of(stored, case.model, EOD)
    config = parts.config(from_model_config(case.model, VOCAB, case.architecture, "float32"))
    classes = [getattr(code, name.split(".")[1]) for name in config["auto_map"].values()]
    # Phi 3 has a padding id outside of a vocabulary this small.
    model: Any = classes[1](classes[0](**{**config, "pad_token_id": None}))
    tensors = dict(parts.buffers)
    for entry in [*entries(case.model, VOCAB, VOCAB, case.architecture), *parts.entries]:
        whole = state[entry.name]
        pieces = split(entry, whole[:VOCAB] if entry.kind == "vocabulary" else whole, case.model)
        tensors |= {name: piece for (name, _), piece in zip(entry.parts, pieces, strict=True)}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown and set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model.eval()


@pytest.fixture(scope="module")
def errors() -> dict[str, tuple[float, float]]:
    transformers.logging.set_verbosity_error()
    return run_single(_errors)


@pytest.mark.parametrize("name", FORMS)
def test_the_exported_code_computes_the_logits_of_every_form(
    name: str, errors: dict[str, tuple[float, float]]
) -> None:
    error, deviation = errors[name]
    assert deviation > 0.1
    assert error < 1e-5 * max(1.0, deviation)
