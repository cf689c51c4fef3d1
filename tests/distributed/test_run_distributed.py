"""run_distributed gives results in order, tells which rank failed and why, and leaves no process behind."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_ext.testing.run_distributed import run_distributed


def _rank_and_sum(value: int) -> tuple[int, str, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + value)])
    dist.all_reduce(total)
    return dist.get_rank(), os.environ["WORLD_SIZE"], total


def test_results_come_in_the_order_of_ranks_and_may_hold_tensors() -> None:
    results = run_distributed(_rank_and_sum, 3, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    assert {size for _, size, _ in results} == {"3"}
    assert all(torch.equal(total, torch.tensor([33.0])) for _, _, total in results)


def _fail_on_one(folder: str) -> None:
    _leave_pid(folder)
    if dist.get_rank() == 1:
        raise ArithmeticError("seven is not eight")
    dist.barrier()


def test_failing_rank_is_named_with_its_traceback_and_the_others_end(tmp_path: object) -> None:
    with pytest.raises(RuntimeError, match="seven is not eight") as error:
        run_distributed(_fail_on_one, 2, str(tmp_path))
    message = str(error.value)
    assert message.startswith("rank 1 failed:")
    assert "ArithmeticError" in message and "_fail_on_one" in message
    _assert_ended(str(tmp_path), 2)


def _die(folder: str) -> None:
    _leave_pid(folder)
    if dist.get_rank() == 0:
        os._exit(7)
    time.sleep(600)


def test_process_that_dies_without_a_word_ends_the_run(tmp_path: object) -> None:
    with pytest.raises(RuntimeError, match="exit code 7"):
        run_distributed(_die, 2, str(tmp_path))
    _assert_ended(str(tmp_path), 2)


def _hang(folder: str) -> None:
    _leave_pid(folder)
    if dist.get_rank() == 1:
        time.sleep(600)


def test_hanging_processes_are_killed_at_the_timeout(tmp_path: object) -> None:
    with pytest.raises(RuntimeError, match="no result within 4 s"):
        run_distributed(_hang, 2, str(tmp_path), timeout=4.0)
    _assert_ended(str(tmp_path), 2)


def _unpicklable() -> object:
    return lambda: None


def test_result_that_cannot_travel_is_an_error_not_a_hang() -> None:
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        run_distributed(_unpicklable, 1)


def _leave_pid(folder: str) -> None:
    with open(f"{folder}/{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    dist.barrier()


def _assert_ended(folder: str, world_size: int) -> None:
    for rank in range(world_size):
        with open(f"{folder}/{rank}") as file:
            pid = int(file.read())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
