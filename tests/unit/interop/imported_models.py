"""What tests ask of a model that was imported, or trained here and exported."""

import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.generation import Sampling, generate, stage_logits
from megatron_ext.inference.load_model import load_model
from megatron_ext.interop import load_hf, load_into
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from tests.unit.interop.hf_models import families_of, tokens
from tools.convert_checkpoint import main


def imported_logits(folder: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Imports a Hugging Face directory in memory; returns its model's logits, and the import's messages."""
    initialize(ParallelConfig(), seed=1)
    source = load_hf(folder)
    families = families_of(source.families.configurations)
    extensions = [family.extension() for family in families]
    chunks = build_model(
        source.model, ParallelConfig(), vocab_size=source.vocab_size, seed=7, extensions=extensions
    )
    load_into(chunks, source.state)
    ids = tokens()
    positions, inputs = torch.arange(ids.size(1)).expand_as(ids), auxiliary_inputs(families, {"tokens": ids})
    with torch.no_grad():
        logits: torch.Tensor = chunks[0].eval()(ids, positions, None, auxiliary_inputs=inputs)
    return logits, source.messages


def exported_and_generated(load: str, target: str, new_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Exports a checkpoint; returns its model's logits, and what it generates."""
    assert main(["export", "--load", load, "--model-dir", target]) == 0
    loaded = load_model(load, FAMILIES)
    positions = torch.arange(tokens().size(1)).expand_as(tokens())
    batch = {"tokens": tokens(), "position_ids": positions}
    with torch.no_grad():
        logits = stage_logits(loaded.model, loaded.families, batch)
    assert logits is not None
    greedy = Sampling(max_new_tokens=new_tokens, temperature=0)
    return logits, generate(loaded.model, loaded.families, [[70, 71]], greedy, 96)[0]
