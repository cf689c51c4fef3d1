"""`--rehearse` as a user runs it: the ranks it chooses, its report, its errors; it writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.testing.torchrun import ROOT, environment
from tests.integration.rehearsal.rehearsal_flags import OVERLAP, PLAIN, PP, SHARDED, SP, TP, needs_device

pytestmark = needs_device


def run(folder: Path, *flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "pretrain_gpt_per_layer.py"), *PLAIN.split(), *flags]
    return subprocess.run(
        command, cwd=folder, env=environment() | variables, capture_output=True, text=True, timeout=240
    )


def test_a_rehearsal_needs_no_data_and_names_flags_without_effect_once(tmp_path: Path) -> None:
    absent = [str(tmp_path / "absent"), "--save", "/proc/not-writable", "--use-mcore-models"]
    done = run(tmp_path, "--data-path", *absent, "--rehearse")
    assert done.returncode == 0, done.stderr
    assert "Rehearsal of rank 0 of 1" in done.stdout
    assert done.stderr.count("flags of Megatron-LM without effect here") == 1


def test_all_kinds_reports_a_rank_of_each_kind_and_writes_nothing(tmp_path: Path) -> None:
    flags = [*(TP + PP + SP).split(), "--save", str(tmp_path / "run"), "--rehearse", "all-kinds"]
    done = run(
        tmp_path, *flags, "--world-size", "8", "--rehearsal-device", "a100", "--device-memory-gb", "0.001"
    )
    assert done.returncode == 1, done.stderr  # it does not fit
    assert "Rehearsal of rank 0 of 8 (tensor 0 of 2, pipeline stage 0 of 2, data 0 of 2)" in done.stdout
    assert "Rehearsal of rank 4 of 8 (tensor 0 of 2, pipeline stage 1 of 2, data 0 of 2)" in done.stdout
    assert done.stdout.count("does not fit") == 2
    assert done.stdout.startswith("rehearsing rank 0, 4 of 8 on simulated GPUs")
    assert done.stdout.count("To lower the peak: ") == 2
    assert "Largest memory of each phase" in done.stdout
    assert "Other operations in step 2, by place" in done.stdout
    assert "tokens/s per GPU" in done.stdout
    assert "Communication in step 2" in done.stdout
    assert "fused kernels: attention, norms, bias + dropout + residual, AdamW; also norms with" in done.stdout
    assert "Host waits for the device" in done.stdout
    assert "pipeline bubble 50.0%" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_names_a_checkpoint_directory_communicates_as_without_it(tmp_path: Path) -> None:
    """With --load the engine is imported while the flags are read, before the rehearsal begins."""
    flags = [*(SHARDED + OVERLAP).split(), "--bf16", "--rehearse", "--world-size", "4"]
    folder = str(tmp_path / "run")
    reports = [run(tmp_path, *flags, *more) for more in ([], ["--load", folder, "--save", folder])]
    assert [done.returncode for done in reports] == [0, 0], reports[1].stderr
    plain, loaded = (done.stdout.split("Communication in step 2")[1].split("\n\n")[0] for done in reports)
    assert "all-gather" in plain
    assert loaded == plain
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "variables", "line"),
    [
        (
            ["--rehearse", "8", "--world-size", "8"],
            {},
            "error: --rehearse 8: must be less than the number of processes, 8: ranks are 0 to 7",
        ),
        (
            ["--rehearse", "--world-size", "3", *TP.split()],
            {},
            "error: world size 3: must be divisible by --tensor-model-parallel-size 2 x "
            "--pipeline-model-parallel-size 1 x --context-parallel-size 1",
        ),
        (
            ["--rehearse", "--rehearsal-device", "abacus"],
            {},
            "error: --rehearsal-device abacus: must be one of H100, H200, B200, A100, A100-40GB, L40S, A10, L4",
        ),
        (
            ["--rehearse", "--transformer-impl", "transformer_engine"],
            {},
            "error: --transformer-impl transformer_engine: --rehearse cannot run Transformer Engine's kernels; "
            "rehearse with --transformer-impl local, --attention-backend sdpa and --no-gradient-accumulation-fusion",
        ),
        (
            ["--rehearse", "--skip-train"],
            {},
            "error: --skip-train: cannot be given with --rehearse, which runs training steps; omit one of the "
            "two flags",
        ),
        (
            ["--world-size", "8"],
            {},
            "error: --world-size 8: requires --rehearse or --dry-run; in a run that trains, torchrun sets the number "
            "of processes",
        ),
        (
            ["--rehearse"],
            {"CXX": "no-such-compiler", "XDG_CACHE_HOME": "."},
            "error: --rehearse: requires a C++ compiler at its first use (no-such-compiler was not found); install "
            "g++, or set CXX",
        ),
    ],
)
def test_a_user_error_is_one_line(
    tmp_path: Path, flags: list[str], variables: dict[str, str], line: str
) -> None:
    done = run(tmp_path, *flags, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")


def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    flags = [
        sys.executable,
        "-c",
        "from megatron_ext.rehearsal.simulated import device_library as d; print(d.library())",
    ]
    variables = environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        subprocess.run(flags, cwd=ROOT, env=variables | more, capture_output=True, text=True, check=True)
        for more in ({}, {"CXX": "no-such-compiler"})
    )
    assert first.stdout == second.stdout
    (library,) = (tmp_path / "megatron_ext").iterdir()
    assert first.stdout.strip() == os.fspath(library)
