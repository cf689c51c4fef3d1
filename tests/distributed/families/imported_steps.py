"""The first training step of an imported model: its loss, and its gradients under the names of transformers."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.interop import load_hf, load_into
from megatron_ext.interop.formats.configs.hf_config import to_model_config
from megatron_ext.interop.formats.per_layer_layout import pack, per_layer_entries
from megatron_ext.interop.formats.weight_layout import Entry, entries, split
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.tiny_training import VOCAB_SIZE, TrainingTrace, local_gradients
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch
from tests.unit.interop.hf_models import KINDS, LENGTH, families_of

NO_LIMIT = 1e9


def first_step(
    folder: str, parallel: ParallelConfig, make_batches: Callable[[int, int], Iterator[Batch]]
) -> TrainingTrace:
    """Returns loss and gradients of the first step of an imported model, in the processes of a layout.

    Args:
        folder: the Hugging Face directory.
        parallel: the layout.
        make_batches: returns micro-batches, for a sequence length and the number of sequences in each.
    """
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
        micro_batch_size=2,
        clip_grad=NO_LIMIT,
    )
    result = stepper.train(make_batches(LENGTH, 2), 1)
    gradients = local_gradients(chunks, result.grad_norm, clip=NO_LIMIT)
    return TrainingTrace(losses=[result.loss], first_gradients=gradients)


def in_their_words(name: str, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns gradients by the names that transformers gives the parameters of the model `name`."""
    content: dict[str, Any] = _configuration(name)
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


@functools.cache
def _configuration(name: str) -> dict[str, Any]:
    content: dict[str, Any] = KINDS[name].build().config.to_dict()
    return content
