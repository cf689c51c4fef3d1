"""Which ranks are rehearsed, where they are, and what the flags accept."""

import pytest

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.rehearsal_config import RehearsalConfig
from megatron_ext.rehearsal.rehearse import ranks_to_rehearse
from megatron_ext.rehearsal.report import fits, place_of
from megatron_ext.rehearsal.simulated.devices import device_named

LAYOUT = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)


@pytest.mark.parametrize(("stages", "ranks"), [(1, [0]), (2, [0, 8]), (4, [0, 4, 12]), (8, [0, 2, 14])])
def test_all_kinds_are_a_rank_of_the_first_the_second_and_the_last_stage(
    stages: int, ranks: list[int]
) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=stages)
    assert ranks_to_rehearse(RehearsalConfig(rehearse="all-kinds"), parallel, 16) == ranks


def test_a_rank_must_exist() -> None:
    assert ranks_to_rehearse(RehearsalConfig(rehearse="15"), LAYOUT, 16) == [15]
    with pytest.raises(ValueError, match="--rehearse 16: .* processes, 16: ranks are 0 to 15$"):
        ranks_to_rehearse(RehearsalConfig(rehearse="16"), LAYOUT, 16)


def test_ranks_lie_as_the_engine_numbers_them() -> None:
    assert [place_of(rank, 16, LAYOUT) for rank in (0, 1, 2, 4, 15)] == [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (1, 0, 1, 3),
    ]


@pytest.mark.parametrize("value", ["last", "-1", "1.5", ""])
def test_only_a_rank_or_all_kinds_is_accepted(value: str) -> None:
    with pytest.raises(ValueError, match=f"--rehearse {value}: must be a rank or all-kinds"):
        RehearsalConfig(rehearse=value)


def test_a_run_fits_with_a_tenth_of_the_memory_to_spare() -> None:
    device = device_named("H100", 10.0)
    gib = 1 << 30
    assert [fits(int(size * gib), device) for size in (8.9, 9.5, 10.1)] == [
        "fits",
        "may not fit",
        "does not fit",
    ]
