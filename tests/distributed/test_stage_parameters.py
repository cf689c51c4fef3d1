"""The memory estimate's parameters of every rank are those of the built model."""

import pytest

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.memory_estimate import stage_parameters
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.models.test_memory_estimate import MODEL, UNTIED, VOCAB, layout_of


def local_parameters(parallel: ParallelConfig) -> list[int]:
    """Parameters this rank holds of the tied and of the untied model."""
    initialize(parallel, 1)
    return [
        sum(
            parameter.numel()
            for chunk in build_model(model, parallel, vocab_size=VOCAB, seed=1)
            for parameter in chunk.parameters()
        )
        for model in (MODEL, UNTIED)
    ]


@pytest.mark.parametrize("name", ["TP2", "PP2", "PP2 interleaved"])
def test_parameters_of_every_rank_equal_those_of_the_built_model(name: str) -> None:
    parallel = LAYOUTS[name]
    ranks = run_distributed(local_parameters, 2, parallel)
    for rank, built in enumerate(ranks):
        stage = rank if parallel.pipeline_model_parallel_size > 1 else 0
        assert [stage_parameters(layout_of(model, parallel), stage) for model in (MODEL, UNTIED)] == built
