"""Perplexity equals torch's cross-entropy over the same stream of tokens, at every parallel layout."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.perplexity import Begin, Perplexity, evaluate_perplexity, held_out_tokens
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.tiny_training import CONTEXT_LAYOUTS, LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES

MODEL = replace(TINY, init_method_std=0.2, hidden_dropout=0.5)
LENGTHS = [[30, 1], [], [25, 16], [3]]
"""Tokens of each sequence, document by document: 75 in all, so 74 predictions, four whole windows and one of 10."""

TOKENS = sum(sum(document) for document in LENGTHS)


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, stream: torch.Tensor) -> str:
    path = str(tmp_path_factory.mktemp("data") / "stream")
    tokens = iter(stream.tolist())
    write_dataset(path, [[[next(tokens) for _ in range(n)] for n in document] for document in LENGTHS])
    return path


@pytest.fixture(scope="module")
def direct(stream: torch.Tensor) -> list[float]:
    """-log p of every token but the first."""
    return run_single(_direct, stream)


def _direct(stream: torch.Tensor) -> list[float]:
    initialize(ParallelConfig(), seed=1)
    model = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)[0].eval()
    losses: list[float] = []
    for start in range(0, len(stream) - 1, MODEL.seq_length):
        window = stream[start : start + MODEL.seq_length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1], torch.arange(len(window) - 1)[None], None)[0]
        losses += F.cross_entropy(logits.double(), window[1:], reduction="none").tolist()
    return losses


def _measured(
    parallel: ParallelConfig, prefix: str, batch: int, max_tokens: int | None, **more: Any
) -> Perplexity:
    initialize(parallel, seed=1)
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1)
    return evaluate_perplexity(
        list(chunks),
        [],
        prefix,
        sequence_length=MODEL.seq_length,
        micro_batch_size=batch,
        max_tokens=max_tokens,
        **more,
    )


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2", "PP2 interleaved", "DP2", "CP2"])
def test_perplexity_equals_cross_entropy_at_every_parallel_layout(
    layout: str, prefix: str, direct: list[float]
) -> None:
    assert len(direct) == TOKENS - 1
    parallel, size = CONTEXT_LAYOUTS.get(layout) or (LAYOUTS[layout], WORLD_SIZES[layout])
    for found in run_distributed(_measured, size, parallel, prefix, 2, None):
        assert found.tokens == TOKENS - 1
        assert found.loss == pytest.approx(math.fsum(direct) / len(direct), rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(math.fsum(direct) / len(direct)), rel=1e-5)


@pytest.mark.parametrize("layout", ["TP1", "PP2 interleaved", "DP2"])
@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("begin", [None, Begin(token=VOCAB_SIZE - 1, ends_documents=True)])
def test_every_rank_reports_the_progress_up_to_the_number_of_predicted_tokens(
    layout: str, max_tokens: int | None, begin: Begin | None, prefix: str
) -> None:
    for reported, total, tokens in run_distributed(
        _progress, WORLD_SIZES[layout], LAYOUTS[layout], prefix, max_tokens, begin
    ):
        assert sum(reported) == total == tokens
        assert len(reported) > 1


def _progress(
    parallel: ParallelConfig, prefix: str, max_tokens: int | None, begin: Begin | None
) -> tuple[list[int], int, int]:
    reported: list[int] = []
    found = _measured(parallel, prefix, 1, max_tokens, begin=begin, progress=reported.append)
    return reported, held_out_tokens(prefix, max_tokens, begin), found.tokens


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_only_the_tokens_asked_for_are_counted(layout: str, prefix: str, direct: list[float]) -> None:
    limits = [1, 16, 17, 40, 1000]
    results = run_distributed(_measured_up_to, WORLD_SIZES[layout], LAYOUTS[layout], prefix, limits)[0]
    for limit, found in zip(limits, results, strict=True):
        counted = direct[:limit]
        assert found.tokens == len(counted)
        assert found.loss == pytest.approx(math.fsum(counted) / len(counted), rel=1e-6)


def _measured_up_to(parallel: ParallelConfig, prefix: str, limits: list[int]) -> list[Perplexity]:
    return [_measured(parallel, prefix, 1, limit) for limit in limits]


def test_dataset_of_one_token_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "one"), [[[7]]])
    with pytest.raises(ValueError, match="one: the dataset must have at least 2 tokens, got 1"):
        run_single(_measured, ParallelConfig(), str(tmp_path / "one"), 1, None)
