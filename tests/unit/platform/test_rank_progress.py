"""Which rank a run waits for, from what all ranks have written."""

from dataclasses import replace

import pytest

from megatron_ext.platform.hosts.rank_progress import RankStatus, find_culprits

WAITING = RankStatus(
    host="host1", pid=7, begun=4, step=120, beat=9, place="engine/step.py:5", waits=True, still=60.0
)
LATER = replace(WAITING, beat=10)


def culprits(**changes: int | bool | str | float) -> list[str]:
    """What rank 0 finds about rank 1, which differs from the waiting ranks 0 and 2 in these values."""
    other = replace(WAITING, host="host2", pid=8)
    now = {0: LATER, 1: replace(other, **{"beat": 10, **changes}), 2: LATER}  # type: ignore[arg-type]
    return find_culprits({0: WAITING, 1: other, 2: WAITING}, now, stuck=30.0)


def test_ranks_that_all_wait_for_each_other_are_not_blamed() -> None:
    assert culprits() == []


def test_a_rank_in_an_earlier_step_has_not_reached_the_latest() -> None:
    assert culprits(begun=3, step=119, waits=False, place="data/read.py:3") == [
        "rank 1 (host2, process 8) has not reached step 120: it is in step 119, at data/read.py:3"
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"begun": 3, "step": 119},
            "rank 1 (host2, process 8) has not reached step 120: it gives no sign of life",
        ),
        ({}, "rank 1 (host2, process 8) has stopped in step 120: it gives no sign of life"),
    ],
)
def test_a_rank_whose_thread_writes_nothing_gives_no_sign_of_life(changes: dict[str, int], text: str) -> None:
    assert culprits(beat=9, **changes) == [text]


def test_a_rank_that_computes_while_others_wait_is_named_with_its_place() -> None:
    assert culprits(waits=False, place="data/read.py:3") == [
        "rank 1 (host2, process 8) is still in step 120, at data/read.py:3"
    ]


def test_a_long_evaluation_in_which_no_rank_waits_for_long_blames_nobody() -> None:
    status = {rank: replace(WAITING, waits=rank == 0, still=2.0, beat=rank) for rank in range(2)}
    now = {rank: replace(one, beat=one.beat + 1) for rank, one in status.items()}
    assert find_culprits(status, now, stuck=30.0) == []


def test_steps_that_begin_again_from_one_in_a_later_phase_count_as_later() -> None:
    assert culprits(begun=3, step=500)[0].startswith(
        "rank 1 (host2, process 8) has not reached step 120: it is"
    )
