"""A layer-parallel run: killed, stopped and continued, and at several parallel layouts."""

import contextlib
import random
import time
import unittest.mock
from pathlib import Path

import pytest
import torch

from megatron_ext.testing.run_distributed import run_and_kill, run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.engine.training_step import Stepper
from tests.integration.npt.kill_and_resume import differences, flags_of, weights_of
from tests.integration.npt.npt_run_helpers import make_base, train, write_data

KILLS = 2
LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "CP2": (2, ["--context-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    made: str = run_single(make_base, str(tmp_path_factory.mktemp("base")), data)
    return made


def test_a_run_that_is_killed_twice_at_random_times_ends_with_the_same_weights_bit_for_bit(
    data: str, base: str, tmp_path: Path
) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    started = time.monotonic()
    run_distributed(train, 1, *flags_of("layer_parallel", whole, base, data))
    seconds, moments = time.monotonic() - started, random.Random(time.time_ns())
    flags = flags_of("layer_parallel", killed, base, data)
    times = [moments.uniform(0.2, 0.9) * seconds for _ in range(KILLS)]
    for moment in times:
        run_and_kill(train, 1, *flags, seconds=moment)
    run_distributed(train, 1, *flags)
    expected = weights_of(whole)
    assert expected and not differences(weights_of(killed), expected), times


def _stopped_in_the_evaluation(*flags: str) -> None:
    with (
        unittest.mock.patch.object(Stepper, "evaluate", side_effect=SystemExit(143)),
        contextlib.suppress(SystemExit),
    ):
        train(*flags)


def test_a_run_that_ends_in_the_final_evaluation_has_written_its_weights(
    data: str, base: str, tmp_path: Path
) -> None:
    flags = flags_of("layer_parallel", str(tmp_path), base, data)
    run_single(_stopped_in_the_evaluation, *flags, "--eval-iters", "1", "--eval-interval", "1000")
    assert (tmp_path / "final/npt_weights.safetensors").is_file()


def test_clipping_that_couples_the_layers_is_noted_once(data: str, base: str, tmp_path: Path) -> None:
    flags = flags_of("layer_parallel", str(tmp_path), base, data)
    _, output = run_single(train, *flags, "--clip-grad", "1e-9")
    assert (
        output.count("exceeds --clip-grad 1e-09; clipping scales the gradients of all layers together") == 1
    )


def _straight_and_stopped(folder: str, base: str, data: str, layout: list[str]) -> list[str]:
    """Outputs of a run, of one that stops in the second of three passes and is continued, and of further steps."""
    straight = [*flags_of("layer_parallel", f"{folder}/straight", base, data), *layout]
    stopped = [*flags_of("layer_parallel", f"{folder}/stopped", base, data), *layout]
    more = [
        "--load",
        f"{folder}/straight/checkpoint-18",
        "--additional-steps",
        "2",
        "--save",
        f"{folder}/more",
    ]
    return [
        train(*straight)[1],
        train(*stopped, "--exit-interval", "6")[1],
        train(*stopped)[1],
        train(*more)[1],
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_stops_between_passes_continues_bit_for_bit_with_the_losses_of_one_process(
    layout: str, data: str, base: str, tmp_path: Path
) -> None:
    processes, flags = LAYOUTS[layout]
    found = run_distributed(_straight_and_stopped, processes, str(tmp_path), base, data, flags)[0]
    straight, stopped, resumed, further = found
    assert "of 4 steps at a time, 3 passes" in straight
    assert "stopped after step 6" in stopped and "continues after step 6" in resumed
    assert "step 20/20" in further
    expected = weights_of(str(tmp_path / "straight"))
    assert expected and not differences(weights_of(str(tmp_path / "stopped")), expected)
    if layout != "TP1":
        single = str(tmp_path / "single")
        run_distributed(train, 1, *flags_of("layer_parallel", single, base, data))
        for key, weight in weights_of(single).items():
            torch.testing.assert_close(expected[key], weight, rtol=1e-3, atol=1e-4)


def test_a_cache_that_cannot_hold_the_states_is_refused_with_its_size(base: str, data: str) -> None:
    # 4 steps of 4 sequences of 16 tokens; 2 layers, 3 states of 32 values in bfloat16.
    flags = [*flags_of("layer_parallel", "unused", base, data), "--teacher-cache-gb", "0.00001"]
    with pytest.raises(
        ValueError, match=r"^--teacher-cache-steps 4: .* 9.16e-05 GiB .* \(0.384 kB per token\)"
    ):
        run_single(train, *flags)
