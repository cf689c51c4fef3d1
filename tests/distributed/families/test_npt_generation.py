"""Generation with a KV cache through NPT layers gives what full forward passes give, at any parallel layout."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES

MODEL = replace(TINY, init_method_std=0.3, hidden_dropout=0.5, attention_dropout=0.5)
"""Weights large enough that the tokens differ; dropout, which must be off."""

LOW_RANK = NPTModuleConfig(
    npt_layers="all", np_target="gate+up+down", np_rank=8, np_residual="keep", np_init_scale=1.0
)
SETTINGS = {
    "low_rank keep": LOW_RANK,
    "key_value drop": replace(LOW_RANK, np_form="key_value", np_residual="drop"),
    "outer drop": replace(LOW_RANK, np_form="outer_product", np_residual="drop", num_np_components=2),
}
PROMPTS = [[5, 17, 80], [3], [9, 9, 2, 41, 60, 7]]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def _build(name: str, parallel: ParallelConfig) -> tuple[GPTModel, NPTFamily]:
    initialize(parallel, seed=1)
    family = NPTFamily(SETTINGS[name])
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()])
    return chunks[0], family


@torch.no_grad()
def _by_full_passes(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """Each token is the argmax of a forward pass over everything before it, without a cache; NP on, and off."""
    model, _ = _build(name, LAYOUTS["TP1"])
    model.eval()

    def continued(prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), None)
            tokens.append(int(logits[0, -1, :VOCAB_SIZE].argmax()))
        return tokens[len(prompt) :]

    on = [continued(prompt) for prompt in PROMPTS]
    with deactivated([model]):
        return on, [continued(prompt) for prompt in PROMPTS]


def _with_cache(name: str, parallel: ParallelConfig) -> list[list[int]]:
    model, family = _build(name, parallel)
    return generate(model, [family], PROMPTS, GREEDY, VOCAB_SIZE)


@pytest.mark.parametrize("name", SETTINGS)
def test_cached_generation_equals_full_passes_at_every_parallel_layout(name: str) -> None:
    expected, base = run_single(_by_full_passes, name)
    assert expected != base, "the NP components change what is generated"
    for layout in ("TP1", "TP2", "PP2"):
        for tokens in run_distributed(_with_cache, WORLD_SIZES[layout], name, LAYOUTS[layout]):
            assert tokens == expected, layout
