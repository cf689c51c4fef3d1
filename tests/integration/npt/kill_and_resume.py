"""Kills NPT runs at random moments, lets them go on, and compares their final weights with an uninterrupted run's.

    python tests/integration/npt/kill_and_resume.py --mode sequential --runs 20
    python tests/integration/npt/kill_and_resume.py --mode multi_layer --runs 20 --processes 2

Every run is started anew in an empty directory, killed (SIGKILL, all processes) at `--kills` random moments, and then
left to end. Exit code 0 where all weights are equal, bit for bit. The models are tiny; what is tested is what is
written and read, and when. A smaller test of the same, with kills at chosen points, is test_sequential_resume.py.
"""

import argparse
import random
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from megatron_ext.testing.run_distributed import run_and_kill, run_distributed
from tests.integration.npt.npt_run_helpers import DATA, MULTI_LAYER, make_base, train, write_data

SEQUENTIAL = shlex.split(
    "--mode sequential --layers 0,1,3 --np-rank 4 --steps-per-layer 6 --stage1-steps 2 --save-steps 2 --lr 1e-2 "
    "--global-batch-size 4"
)
SEQUENTIAL += DATA
CURRICULUM = shlex.split(
    "--curriculum-stages teacher:4,mixed:6:0.3,student:8 --train-iters 18 --save-steps 3"
)
LAYER_PARALLEL = shlex.split(
    "--mode layer_parallel --npt-layers upper_half --np-rank 4 --lr 1e-2 --batch_size 2 --global-batch-size 4 "
    "--teacher-cache-steps 4 --teacher-cache-passes 3 --teacher-cache-gb 1 --train-iters 18 --save-steps 3"
)
LAYER_PARALLEL += DATA
TIMESTAMP = r"_\d{8}_\d{6}"


def flags_of(mode: str, folder: str, base: str, data: str) -> list[str]:
    """The command of a run in `folder`; the same for its start and for going on."""
    # The shared flags of the tests have no loader processes; a user's run has two.
    shared = ["--base-checkpoint", base, "--data-path", data, "--num-workers", "2"]
    if mode == "sequential":
        return [*SEQUENTIAL, *shared, "--checkpoint-dir", folder]
    flags = LAYER_PARALLEL if mode == "layer_parallel" else [*MULTI_LAYER, *CURRICULUM]
    return [*flags, *shared, "--load", folder, "--save", folder]


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    """All tensors that a finished run leaves in files of NP weights, by file (without the time in its path) and key."""
    files = [*Path(folder).glob("accumulated_npt_weights.pt"), *Path(folder).rglob("final/npt_weights.pt")]
    return {
        f"{re.sub(TIMESTAMP, '', str(file.relative_to(folder)))}/{key}": tensor
        for file in files
        for key, tensor in torch.load(file, weights_only=True).items()
    }


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal to the bit, or are missing in one."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def main() -> int:
    """Runs all; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mode", choices=["sequential", "multi_layer", "layer_parallel"], default="sequential"
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="kills in every run")
    parser.add_argument("--processes", type=int, default=1, help="tensor-parallel processes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    layout = ["--tensor-model-parallel-size", str(options.processes)]
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        base = run_distributed(make_base, 1, folder, data)[0]

        def command(name: str) -> list[str]:
            return [*flags_of(options.mode, f"{folder}/{name}", base, data), *layout]

        for attempt in (
            "warm-up",
            "whole",
        ):  # the first one also makes the data's index, and loads the imports
            started = time.monotonic()
            run_distributed(train, options.processes, *command(attempt))
            seconds = time.monotonic() - started
            print(f"{attempt}: {seconds:.1f} s", flush=True)
        whole, failed = weights_of(f"{folder}/whole"), 0
        assert whole and not differences(weights_of(f"{folder}/warm-up"), whole)
        for number in range(1, options.runs + 1):
            told = []
            for _ in range(options.kills):
                moment = moments.uniform(0, 1.1 * seconds)
                ended = run_and_kill(train, options.processes, *command(f"run-{number}"), seconds=moment)
                told.append(f"{moment:.2f} s{' (had ended)' if ended else ''}")
            run_distributed(train, options.processes, *command(f"run-{number}"))
            found = differences(weights_of(f"{folder}/run-{number}"), whole)
            failed += bool(found)
            result = f"DIFFERENT: {found[:3]}" if found else f"{len(whole)} tensors equal"
            print(f"run {number}: killed after {', '.join(told)}; {result}", flush=True)
    print(
        f"{options.runs - failed} of {options.runs} runs end with the uninterrupted run's weights, bit for bit"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
