"""A sequential run that is killed again and again, at chosen points, ends with the weights of one that never was.

The process ends itself with SIGKILL at its n-th operation: a training step, or something that changes the directory
(a rename, a replacement, a removal), before or after it is done. `kill_and_resume.py` does it at random moments.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.training.engine.training_step import Stepper
from tests.integration.npt.conftest import SequentialRun
from tests.integration.npt.kill_and_resume import differences, weights_of
from tests.integration.npt.npt_run_helpers import train

POINTS = (5, 14, 6, 13, 12, 2)
"""Operations at which the processes, one after the other, are killed; before odd ones, after even ones."""

KILLED = [
    "before replace latest_checkpointed_iteration.txt",  # checkpoint-2 has its name, and the tracker does not name it
    "after replace accumulated_npt_weights.pt",
    "after rename final",
    "before replace training_info.json",  # the first layer is trained, and not yet counted as such
    "after replace training_info.json",
    "after step",  # of the second layer
]
"""What these are."""


def _train_until(point: int, flags: list[str], told: str) -> None:
    """Trains; killed at the operation with this number, whose name is added to a file then."""
    count = 0

    def counted(operation: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal count
            if name != "step" and Path(args[-1]).name == ".metadata":
                return operation(*args, **options)  # inside a checkpoint that is not complete yet
            count += 1
            if count == point:
                what = "step" if name == "step" else f"{name} {Path(args[-1]).name}"
                with open(told, "a") as file:
                    file.write(f"{'before' if point % 2 else 'after'} {what}\n")
            if count == point and point % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **options)
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    os.replace = counted(os.replace, "replace")
    os.rename = counted(os.rename, "rename")
    shutil.rmtree = counted(shutil.rmtree, "remove")  # type: ignore[assignment]
    Stepper.start = counted(Stepper.start, "step")  # type: ignore[method-assign]
    train(*flags)


def test_a_killed_run_goes_on_and_ends_with_the_same_weights_bit_for_bit(
    sequential_run: SequentialRun, tmp_path: Path
) -> None:
    # With loader processes, as a user's run has them; the uninterrupted run read its data itself.
    flags, told = [*sequential_run.flags(tmp_path / "run"), "--num-workers", "2"], tmp_path / "killed"
    for point in POINTS:
        with pytest.raises(RuntimeError, match="exit code -9"):
            run_distributed(_train_until, 1, point, flags, str(told))
    assert told.read_text().splitlines() == KILLED
    run_distributed(train, 1, *flags)
    weights = weights_of(str(sequential_run.folder))
    assert len(weights) == 24 and not differences(weights_of(str(tmp_path / "run")), weights)
    left = [path for path in (tmp_path / "run").rglob(".*") if path.name != ".metadata"]
    assert not left, "nothing of the killed processes is left"
