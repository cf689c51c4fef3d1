"""Kills runs of the scripts while they save beside training, and compares what they become with uninterrupted runs.

    python tests/integration/scripts/kill_async_saves.py --kills 20
    python tests/integration/scripts/kill_async_saves.py --script pretrain_npt.py --kills 5

Every run starts in an empty directory, under torchrun with two ranks and loader processes, saves after every step with
`--async-save`, and is killed (SIGKILL, all processes) at a random moment. The same command then goes on to its end.
Exit code 0 where all tensors are equal to those of a run that nothing has stopped and that saves without the flag, bit
for bit. A smaller test of the same is test_async_save_of_scripts.py.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.warm_python.signalled_runs import Running, run_until
from megatron_ext.training.checkpoint import checkpoint_files as files
from tests.integration.npt.kill_and_resume import differences
from tests.integration.npt.npt_run_helpers import make_base, write_data
from tests.integration.scripts import test_stop_signals_of_scripts as runs

ASYNC = ["--async-save", "--save-interval", "1"]
MORE = {runs.GPT: ["--vocab-size", "20000"], runs.NPT: runs.MULTI_LAYER, runs.PROGRESSIVE: []}
"""A larger vocabulary makes the save longer than a step."""


@dataclass(frozen=True)
class Prepared:
    """What the runs of one script share."""

    script: str
    data: str
    base: str = ""

    def command(self, save: Path) -> list[str]:
        """The command under torchrun, for the start and for going on."""
        return runs.command(self.script, self.data, save, *MORE[self.script], *ASYNC, base=self.base)

    def finish(self, save: Path, *more: str) -> str:
        """Runs the same command to its end; returns its output."""
        return runs.finish(self.script, self.data, save, *MORE[self.script], *more, base=self.base)

    def tensors(self, save: Path) -> dict[str, torch.Tensor]:
        """All tensors of the run's newest checkpoint."""
        newest = "progressive_rack" if self.script == runs.PROGRESSIVE else ""
        found: dict[str, torch.Tensor] = run_single(runs.tensors_of, str(save), newest)
        return found


def kill(prepared: Prepared, save: Path, step: int, seconds: float) -> list[str]:
    """Starts a run, and kills all its processes some time after a step; returns the names of unfinished saves."""

    def act(running: Running) -> None:
        assert len(running.loaders) >= 2 * len(running.ranks)
        time.sleep(seconds)
        for process in (*running.ranks, *running.loaders):
            if process.is_running():
                process.kill()
        running.process.kill()

    result = run_until(prepared.command(save), rf"step +{step}/", act)
    assert not result.still_running, result.output
    return [path.name for path in save.rglob(f"{files.WRITING}*")]


def main() -> int:
    """Runs all; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", choices=list(MORE), default=runs.GPT)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    moments, failed, unfinished = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder)
        base = run_single(make_base, str(folder), data) if options.script == runs.NPT else ""
        prepared = Prepared(options.script, data, base)
        prepared.finish(folder / "whole")
        whole = prepared.tensors(folder / "whole")
        for number in range(1, options.kills + 1):
            step, seconds = moments.randint(1, 6), moments.uniform(0, 0.3)
            save = folder / f"run-{number}"
            left = kill(prepared, save, step, seconds)
            unfinished += bool(left)
            output = prepared.finish(save, *ASYNC)
            found = differences(prepared.tensors(save), whole)
            failed += bool(found)
            resumed = "continues after" in output
            print(
                f"run {number}: killed {seconds:.3f} s after step {step}, {left or 'no unfinished save'}, "
                f"{'resumed' if resumed else 'begun anew'}; "
                + (f"DIFFERENT: {found[:3]}" if found else f"{len(whole)} tensors equal"),
                flush=True,
            )
    print(
        f"{options.kills - failed} of {options.kills} runs end with the uninterrupted run's tensors, bit for bit; "
        f"{unfinished} kills left an unfinished save"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
