"""Losses and gradients of imported models are those of transformers at any layout: one or two of each architecture."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.interop import load_hf, load_into
from megatron_ext.interop.formats.configs.hf_config import to_model_config
from megatron_ext.interop.formats.per_layer_layout import pack, per_layer_entries
from megatron_ext.interop.formats.weight_layout import Entry, entries, split
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    CONTEXT_LAYOUTS,
    LAYOUTS,
    VOCAB_SIZE,
    TrainingTrace,
    assemble,
    local_gradients,
    synthetic_batches,
    with_full_recompute,
)
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from tests.unit.interop.hf_models import KINDS, LENGTH, families_of

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
NO_LIMIT = 1e9


def _traced(path: str, layouts: dict[str, ParallelConfig]) -> dict[tuple[str, str], TrainingTrace]:
    """Loss and gradients of the first step of every model at every layout, in the processes of the layout."""
    return {
        (name, layout): _trace(f"{path}/{name}", parallel)
        for layout, parallel in layouts.items()
        for name in NAMES
    }


def _trace(folder: str, parallel: ParallelConfig) -> TrainingTrace:
    initialize(parallel, seed=1)
    source = load_hf(folder, seq_length=LENGTH)
    families = families_of(source.families.configurations)
    extensions = [family.extension() for family in families]
    chunks = build_model(source.model, parallel, vocab_size=source.vocab_size, seed=7, extensions=extensions)
    load_into(chunks, source.state)
    wrapped = wrap_model(chunks, parallel)
    settings = OptimizerSettings(lr=1e-9, lr_decay_style="constant")
    optimizer = build_optimizer(settings, parallel, wrapped, families)
    scheduler = build_scheduler(settings, TrainingConfig(train_iters=1), optimizer, 4)
    stepper = Stepper(
        wrapped,
        families,
        optimizer,
        scheduler,
        global_batch_size=4,
        micro_batch_size=1,
        clip_grad=NO_LIMIT,
    )
    result = stepper.train(synthetic_batches(LENGTH), 1)
    gradients = local_gradients(chunks, result.grad_norm, clip=NO_LIMIT)
    return TrainingTrace(losses=[result.loss], first_gradients=gradients)


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
    found = _in_their_words(name, assemble(ranks))
    assert found.keys() == gradients.keys()
    for parameter, expected in gradients.items():
        difference = torch.linalg.norm(found[parameter] - expected)
        assert expected.any(), parameter
        assert difference <= 1e-5 * torch.linalg.norm(expected), parameter


def _in_their_words(name: str, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    content: dict[str, Any] = KINDS[name].build().config.to_dict()
    source = to_model_config(content, "config.json")
    model = replace(source.model, seq_length=LENGTH)
    layout = entries(model, VOCAB_SIZE, VOCAB_SIZE, f"{KINDS[name].name}ForCausalLM")
    if source.per_layer is not None:
        layout += per_layer_entries(model, source.per_layer, VOCAB_SIZE, VOCAB_SIZE)
    found: dict[str, torch.Tensor] = {}
    slices: dict[str, list[Entry]] = {}
    for entry in layout:
        if entry.name.endswith("layer_scalar"):  # a buffer, which is not trained
            continue
        if entry.kind == "slice":
            slices.setdefault(entry.parts[0][0], []).append(entry)
            continue
        parts = split(entry, gradients[entry.name], model)
        found |= {part: value for (part, _), value in zip(entry.parts, parts, strict=True)}
    for name, of_one in slices.items():
        found[name] = pack(of_one, [gradients[entry.name] for entry in of_one])
    return found
