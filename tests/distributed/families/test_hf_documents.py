"""Imported models on packed documents train as transformers does on each document alone.

Among the models are those with sliding windows, and those whose rotary frequencies change with the length of the
sequence: there each document has the frequencies of its own length.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    CONTEXT_LAYOUTS,
    LAYOUTS,
    TrainingTrace,
    assemble,
    synthetic_batches,
    with_full_recompute,
)
from megatron_ext.training.interface.family_interface import Batch
from tests.distributed.families.imported_steps import first_step, in_their_words
from tests.unit.interop.hf_models import KINDS, LENGTH

BY_LENGTH = ("Llama, dynamic", "Phi3, longrope")
"""Models with other frequencies in documents of more than 32 and 20 tokens."""

NAMES = (
    *BY_LENGTH,
    "Mistral, sliding window",
    "Gemma3, scaled and limited",
    "Gemma4",
    "Gemma3n",
    "Olmo3",
    "SmolLM3",
)
STARTS = ((0, 5, 6, 33), (0, 40))
"""Where documents begin in two kinds of sequences: of 5, 1, 27 and 15 tokens, and of 40 and 8."""

OF_TWO = {
    "TP2+SP": LAYOUTS["TP2+SP"],
    "PP2": LAYOUTS["PP2"],
    "PP2 interleaved, recomputed": with_full_recompute(LAYOUTS["PP2 interleaved"]),
    "CP2": CONTEXT_LAYOUTS["CP2"][0],
}
CASES = [*((name, "TP1") for name in NAMES), *itertools.product((*BY_LENGTH, "Gemma4"), OF_TWO)]


def _starts(row: torch.Tensor) -> tuple[int, ...]:
    return STARTS[int(row[0]) % 2]


def packed(length: int, micro_batch_size: int) -> Iterator[Batch]:
    """Yields the synthetic batches with documents, which depend on a sequence's first token only."""
    for batch in synthetic_batches(length, micro_batch_size):
        marks = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        for row, tokens in zip(marks, batch["tokens"], strict=True):
            row[list(_starts(tokens))] = True
        yield batch | {DOCUMENT_STARTS: marks}


def _steps(path: str, cases: list[tuple[str, ParallelConfig]]) -> list[TrainingTrace]:
    return [first_step(f"{path}/{name}", parallel, packed) for name, parallel in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents")
    for name in NAMES:
        KINDS[name].build().save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def traces(folder: Path) -> dict[tuple[str, str], list[TrainingTrace]]:
    """The traces of all ranks."""
    found: dict[tuple[str, str], list[TrainingTrace]] = {}
    for size, layouts in ((1, {"TP1": LAYOUTS["TP1"]}), (2, OF_TWO)):
        cases = [case for case in CASES if case[1] in layouts]
        ranks = run_distributed(_steps, size, str(folder), [(name, layouts[at]) for name, at in cases])
        found |= dict(zip(cases, map(list, zip(*ranks, strict=True)), strict=True))
    return found


@functools.cache
def _theirs(name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in transformers, of the documents of the same four sequences one by one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 96, (4, LENGTH + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 3) % 96
    assert {_starts(row) for row in tokens} == set(STARTS)
    model, total = KINDS[name].build(), 0.0
    for row in tokens:
        for start, end in itertools.pairwise((*_starts(row), LENGTH)):
            logits = model(row[None, start:end]).logits[0]
            loss = F.cross_entropy(logits, row[start + 1 : end + 1], reduction="sum") / (4 * LENGTH)
            loss.backward()
            total += float(loss.detach())
    return total, {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_loss_and_every_gradient_are_those_of_transformers_on_each_document_alone(
    name: str, layout: str, traces: dict[tuple[str, str], list[TrainingTrace]]
) -> None:
    loss, gradients = _theirs(name)
    ranks = traces[name, layout]
    assert ranks[-1].losses[0] == pytest.approx(loss, rel=1e-5)
    found = in_their_words(name, assemble(ranks))
    assert found.keys() == gradients.keys()
    for parameter, expected in gradients.items():
        difference = torch.linalg.norm(found[parameter] - expected)
        assert difference <= 1e-5 * torch.linalg.norm(expected), parameter
