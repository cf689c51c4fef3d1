"""--recompute-activations: the core attention runs again in the backward pass, and nothing else changes."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import VOCAB_SIZE
from tests.unit.training.test_training_step import MODEL


def _passes(
    parallel: ParallelConfig, backend: Literal["sdpa", "local"]
) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Calls of the core attention and of the MLP in a forward and backward pass, and the gradients."""
    initialize(parallel, seed=1)
    model = replace(MODEL, attention_backend=backend, attention_dropout=0.1)
    (chunk,) = build_model(model, parallel, vocab_size=VOCAB_SIZE, seed=1)
    calls = {"attention": 0, "mlp": 0}

    def count(name: str) -> None:
        calls[name] += 1

    for layer in chunk.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(lambda *_: count("attention"))
        layer.mlp.register_forward_pre_hook(lambda *_: count("mlp"))
    tokens = torch.arange(2 * model.seq_length).view(2, -1) % VOCAB_SIZE
    positions = torch.arange(model.seq_length).expand(2, -1)
    chunk(tokens, positions, None, labels=tokens.roll(1, 1)).sum().backward()
    gradients = {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}
    return calls["attention"], calls["mlp"], gradients


@pytest.mark.parametrize("backend", ["sdpa", "local"])
def test_only_the_core_attention_runs_twice_and_the_gradients_are_the_same_to_the_bit(backend: str) -> None:
    plain = run_single(_passes, ParallelConfig(), backend)
    again = run_single(_passes, ParallelConfig(recompute_activations=True), backend)
    assert plain[:2] == (MODEL.num_layers, MODEL.num_layers)
    assert again[:2] == (2 * MODEL.num_layers, MODEL.num_layers)
    assert plain[2].keys() == again[2].keys()
    for name, gradient in plain[2].items():
        assert torch.equal(gradient, again[2][name]), name
