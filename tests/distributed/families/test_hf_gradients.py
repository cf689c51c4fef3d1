"""Losses and gradients of imported models are those of transformers at any layout: one or two of each architecture."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    CONTEXT_LAYOUTS,
    LAYOUTS,
    VOCAB_SIZE,
    TrainingTrace,
    assemble,
    synthetic_batches,
    with_full_recompute,
)
from tests.distributed.families.imported_steps import first_step, in_their_words
from tests.unit.interop.hf_models import KINDS, LENGTH

NAMES = (
    "Mistral, sliding window",
    "Qwen2, sliding windows",
    "Gemma3",
    "Gemma3, scaled and limited",
    "Gemma3, no windows",
    "Gemma4",
    "Gemma4, keys are values",
    "Gemma4, no per-layer embedding",
    "Gemma3n",
    "Gemma3n, three streams, biases",
    "Phi3, longrope",
    "Olmo2",
    "Olmo3",
    "SmolLM3",
    "Granite",
    "Llama, dynamic",
)
OF_TWO = {name: LAYOUTS[name] for name in ("TP2", "TP2+SP", "PP2", "PP2 interleaved")}
OF_TWO["CP2"] = CONTEXT_LAYOUTS["CP2"][0]
ALL = {"TP1": LAYOUTS["TP1"], **OF_TWO}
ALL |= {f"{name}, recomputed": with_full_recompute(parallel) for name, parallel in ALL.items()}


def _traced(path: str, layouts: dict[str, ParallelConfig]) -> dict[tuple[str, str], TrainingTrace]:
    """Loss and gradients of the first step of every model at every layout, in the processes of the layout."""
    return {
        (name, layout): first_step(f"{path}/{name}", parallel, synthetic_batches)
        for layout, parallel in layouts.items()
        for name in NAMES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients")
    for name in NAMES:
        KINDS[name].build().save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def traces(folder: Path) -> dict[tuple[str, str], list[TrainingTrace]]:
    """The traces of all ranks."""
    of_one = {name: parallel for name, parallel in ALL.items() if name.startswith("TP1")}
    of_two = {name: parallel for name, parallel in ALL.items() if name not in of_one}
    found: dict[tuple[str, str], list[TrainingTrace]] = {}
    for size, layouts in ((1, of_one), (2, of_two)):
        for rank in run_distributed(_traced, size, str(folder), layouts):
            for key, trace in rank.items():
                found.setdefault(key, []).append(trace)
    return found


@functools.cache
def _theirs(name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in transformers, of the same four sequences."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (4, LENGTH + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 3) % VOCAB_SIZE
    model = KINDS[name].build()
    logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_those_of_transformers(
    name: str, layout: str, folder: Path, traces: dict[tuple[str, str], list[TrainingTrace]]
) -> None:
    loss, gradients = _theirs(name)
    ranks = traces[name, layout]
    assert ranks[-1].losses[0] == pytest.approx(loss, rel=1e-5)
    found = in_their_words(name, assemble(ranks))
    assert found.keys() == gradients.keys()
    for parameter, expected in gradients.items():
        difference = torch.linalg.norm(found[parameter] - expected)
        assert expected.any(), parameter
        assert difference <= 1e-5 * torch.linalg.norm(expected), parameter
