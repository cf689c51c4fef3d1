"""An error on one rank becomes the same error on every rank, before the others wait for it in a collective."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ext.platform.collectives import (
    gather_or_raise,
    is_first_rank,
    merge_over_ranks,
    on_every_rank,
    on_first_rank,
)
from megatron_ext.testing.run_distributed import run_distributed


def _outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return type(error).__name__, str(error)


def _fail(error: Exception) -> None:
    if dist.get_rank() == 1:
        raise error


def _outcomes() -> dict[str, Any]:
    rank = dist.get_rank()
    errors = {
        "value": ValueError("--lr 0: must be above 0"),
        "missing": FileNotFoundError("d.idx: not there"),
        "system": PermissionError(13, "Permission denied", "/save"),
        "other": KeyError("name"),
    }
    return {
        **{name: _outcome(partial(gather_or_raise, partial(_fail, error))) for name, error in errors.items()},
        "gathered": gather_or_raise(lambda: rank),
        "own": on_every_rank(lambda: rank),
        "first": on_first_rank(lambda: f"rank {rank}"),
        "merged": merge_over_ranks({rank: str(rank), "both": "same"}),
    }


def test_every_rank_gets_the_error_of_the_rank_that_failed_and_the_results_of_all_others() -> None:
    first, second = run_distributed(_outcomes, 2)
    expected = {
        "value": ("ValueError", "--lr 0: must be above 0"),
        "missing": ("FileNotFoundError", "d.idx: not there"),
        "system": ("OSError", "/save: Permission denied"),
        "other": ("RuntimeError", "rank 1 failed: 'name'"),
        "gathered": [0, 1],
        "own": 0,
        "first": "rank 0",
        "merged": {0: "0", 1: "1", "both": "same"},
    }
    assert first == expected
    assert second == {**expected, "other": ("KeyError", "'name'"), "own": 1}


def test_without_a_process_group_there_is_one_rank() -> None:
    assert is_first_rank()
    assert gather_or_raise(lambda: 3) == [3]
    assert on_first_rank(lambda: 3) == on_every_rank(lambda: 3) == 3
    with pytest.raises(KeyError):
        on_every_rank(lambda: dict[str, int]()["name"])
