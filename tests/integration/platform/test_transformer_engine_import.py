"""Where Transformer Engine cannot be used, megatron-core finds it absent, and a run says in one line why.

The packages here are folders with the real package's name; the last test imports the real one.
"""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_ext.platform.engine_imports import te_versions
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.torchrun import ROOT, environment
from megatron_ext.testing.transformer_engine.install import FOLDER
from megatron_ext.testing.transformer_engine.run_with_te import needs_te

REASON = """
from megatron_ext.platform import engine_imports
if {with_device}:
    engine_imports._missing_device = lambda: None
print(engine_imports.transformer_engine_problem())
from megatron.core.extensions import transformer_engine
print(transformer_engine.HAVE_TE)
"""
NO_DEVICE = "Transformer Engine requires a CUDA device, and none was found"

ENGINE = f"megatron-core {metadata.version('megatron-core')}"
OTHER_VERSION = f"Transformer Engine {{}} is installed, but {ENGINE} supports {te_versions()}"
needs_bounds = pytest.mark.skipif(
    not te_versions(), reason="this megatron-core names no versions of Transformer Engine"
)


def _package(folder: Path, version: str, source: str) -> Path:
    package, information = folder / "transformer_engine", folder / f"transformer_engine-{version}.dist-info"
    (package / "pytorch").mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "pytorch" / "__init__.py").write_text("")
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
    )
    return folder


def _reason(folder: Path, with_device: bool) -> list[str]:
    """Why Transformer Engine cannot be used, and whether the engine has it, with a folder's packages."""
    script = REASON.format(with_device=with_device)
    variables = environment()
    variables["PYTHONPATH"] = f"{folder}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("version", "source", "with_device", "reason"),
    [
        pytest.param("2.8.0", "", True, OTHER_VERSION.format("2.8.0"), marks=needs_bounds),
        pytest.param("2.12.0", "", True, OTHER_VERSION.format("2.12.0"), marks=needs_bounds),
        ("2.11.0", "", False, NO_DEVICE),
        (
            "2.11.0+local",
            "raise RuntimeError('libcudnn.so is missing\\nsecond line')",
            True,
            "Transformer Engine 2.11.0+local cannot be imported (RuntimeError: libcudnn.so is missing)",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_absent_to_the_engine_and_the_reason_is_one_line(
    version: str, source: str, with_device: bool, reason: str, tmp_path: Path
) -> None:
    found, engine_has_it = _reason(_package(tmp_path, version, source), with_device)
    assert found == reason
    assert engine_has_it == "False"


@needs_te
def test_the_real_package_without_its_compiled_parts_is_named_as_incomplete() -> None:
    found, engine_has_it = _reason(FOLDER, with_device=True)
    assert re.match(r"Transformer Engine 2\.11\.0 cannot be imported \(RuntimeError: Found empty", found)
    assert engine_has_it == "False"


def test_the_supported_versions_are_those_that_the_engine_names_and_the_extra_asks_for() -> None:
    def bounds(requirement: str) -> set[str]:
        return set(re.findall(r"[<>]=?[\w.]+", requirement))

    required = metadata.requires("megatron-core") or []
    (of_engine,) = [line for line in required if line.startswith("transformer-engine")]
    (of_extra,) = re.findall(r'^te = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    assert bounds(te_versions()) == bounds(of_engine.split(";")[0])
    assert bounds(te_versions()) in (bounds(of_extra), set())  # from 0.17 on the engine names none


@pytest.mark.parametrize(
    ("flags", "named", "on_a_cpu"),
    [
        (
            ["--transformer-impl", "transformer_engine"],
            "--transformer-impl transformer_engine",
            "; on a CPU use --transformer-impl local",
        ),
        (["--attention-backend", "te"], "--attention-backend te", "; on a CPU use --attention-backend sdpa"),
        (["--fp8-format", "hybrid", "--bf16"], "--fp8-format hybrid", ""),
        (["--gradient-accumulation-fusion"], "--gradient-accumulation-fusion", ""),
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "layernorm"],
            "--recompute-modules layernorm",
            "",
        ),
    ],
)
def test_a_run_that_asks_for_what_only_te_can_do_ends_with_one_line(
    flags: list[str], named: str, on_a_cpu: str
) -> None:
    done = _refused(*flags)
    reason = "Transformer Engine is not installed (pip install 'megatron-ext[te]')"
    if not torch.cuda.is_available():
        reason = NO_DEVICE + on_a_cpu  # installing it would not help
    assert done.stderr.splitlines() == [f"error: {named}: {reason}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_flags_that_require_a_gpu_are_refused_in_one_line_that_says_what_to_use_on_a_cpu() -> None:
    done = _refused("--transformer-impl", "transformer_engine", "--distributed-backend", "nccl")
    assert done.stderr.splitlines() == [
        "error: --transformer-impl transformer_engine, --distributed-backend nccl: a CUDA device is required, and none "
        "was found; on a CPU use --transformer-impl local --distributed-backend gloo"
    ]


def _refused(*flags: str) -> "subprocess.CompletedProcess[str]":
    """A run with these flags, which ends with an error in them."""
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1 --train-iters 1"
    rest = "--tokenizer-type ByteLevelTokenizer --data-path none"
    done = run_script("pretrain_gpt_per_layer.py", *shape.split(), *rest.split(), *flags)
    assert done.returncode == 2
    return done
