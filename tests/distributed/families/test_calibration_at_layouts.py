"""Calibration: its moments against a plain computation, and the same result at every parallel layout."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.calibration.moments import collect_moments, sample_labels
from megatron_ext.platform.collectives import merge_over_ranks
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import (
    CONTEXT_LAYOUTS,
    LAYOUTS,
    TINY,
    VOCAB_SIZE,
    WORLD_SIZES,
    synthetic_batches,
)

MODEL = replace(TINY, init_method_std=0.2, hidden_dropout=0.5, attention_dropout=0.5)
LAYERS, SAMPLES, SEED = (1, 3), 6, 11
"""6 samples: with four stages or two data-parallel ranks the last group is not full."""
CHECKED = ("TP2", "TP2+SP", "PP2", "PP2 interleaved", "DP2", "TP2xPP2", "CP2", "PP2xCP2")


def _chunks(parallel: ParallelConfig) -> list[GPTModel]:
    initialize(parallel, seed=1)
    return build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1)


def _batches() -> Iterator[dict[str, torch.Tensor]]:
    # A global batch of 4 sequences; the second one has two that do not count.
    return synthetic_batches(MODEL.seq_length)


def _collected(parallel: ParallelConfig, gradients: bool) -> dict[int, list[torch.Tensor]]:
    chunks = _chunks(parallel)
    found = collect_moments(chunks, LAYERS, _batches(), SAMPLES, gradients=gradients, seed=SEED)
    return merge_over_ranks({number: of_layer.parts() for number, of_layer in found.items()})


def _by_hand() -> dict[int, list[torch.Tensor]]:
    """One sequence at a time, with gradients from autograd of a sum over its tokens."""
    (model,) = _chunks(ParallelConfig())
    model.eval()
    totals = {number: [torch.zeros(32, 32, dtype=torch.float64) for _ in range(4)] for number in LAYERS}
    batches = _batches()
    for sample in range(SAMPLES):
        batch, seen = next(batches), dict[str, Any]()
        hooks = [
            module.register_forward_hook(
                lambda _, args, output, name=f"{name} {number}", seen=seen: seen.update(
                    {name: (args, output)}
                )
            )
            for number in LAYERS
            for name, module in (
                ("attention", model.decoder.layers[number].self_attention),
                ("norm", model.decoder.layers[number].pre_mlp_layernorm),
                ("layer", model.decoder.layers[number]),
            )
        ]
        logits = model(batch["tokens"], batch["position_ids"], None).transpose(0, 1)
        generator = torch.Generator().manual_seed(SEED + sample)
        uniform = torch.rand(MODEL.seq_length, 1, dtype=torch.float64, generator=generator)
        labels = sample_labels(logits.detach(), uniform, parallel_state.get_tensor_model_parallel_group())
        loss = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="sum")
        for hook in hooks:
            hook.remove()
        for number in LAYERS:
            norm = model.decoder.layers[number].pre_mlp_layernorm
            (x,), normed = seen[f"norm {number}"]
            values, bias = seen[f"attention {number}"][1]
            attention = values if bias is None else values + bias
            u = attention / torch.sqrt((x**2).mean(-1, keepdim=True) + MODEL.norm_epsilon)
            of_normed, of_output = torch.autograd.grad(
                loss, [normed, seen[f"layer {number}"][1][0]], retain_graph=True
            )
            rows = (u, of_normed * norm.weight, attention, of_output)
            for total, row in zip(totals[number], rows, strict=True):
                row = row.detach()[:, 0].double()
                total += row.t() @ row / (SAMPLES * MODEL.seq_length)
    return totals


def _assert_equal(found: dict[int, list[torch.Tensor]], expected: dict[int, list[torch.Tensor]]) -> None:
    assert found.keys() == set(LAYERS)
    for number, parts in expected.items():
        for index, part in enumerate(parts):
            difference = torch.linalg.norm(found[number][index] - part)
            assert difference < 2e-5 * torch.linalg.norm(part), (number, index)


@pytest.fixture(scope="module")
def by_hand() -> dict[int, list[torch.Tensor]]:
    return run_single(_by_hand)


@pytest.mark.parametrize("layout", ["TP1", *CHECKED])
def test_moments_are_those_of_a_plain_computation_at_every_layout(
    layout: str, by_hand: dict[int, list[torch.Tensor]]
) -> None:
    parallel, size = CONTEXT_LAYOUTS.get(layout) or (LAYOUTS[layout], WORLD_SIZES[layout])
    for found in run_distributed(_collected, size, parallel, True):
        _assert_equal(found, by_hand)


def test_without_gradients_the_covariances_are_the_same_and_nothing_else_is_computed(
    by_hand: dict[int, list[torch.Tensor]],
) -> None:
    found = run_single(_collected, ParallelConfig(), False)
    for number, (inputs, metric, attention, output) in found.items():
        torch.testing.assert_close(inputs, by_hand[number][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(attention, by_hand[number][2], rtol=1e-4, atol=1e-6)
        assert not metric.any() and not output.any()
