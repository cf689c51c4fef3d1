"""The limit on spinning OpenMP threads: set before torch is loaded, and never against the user's choice."""

import os
import subprocess
import sys

import pytest

from megatron_ext.platform.process import openmp_waiting

_DISPLAY = "import megatron_ext, sys; assert 'torch' not in sys.modules; import torch; torch.ones(2) + 1"


def test_torchs_openmp_library_reads_the_limit() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in openmp_waiting._CHOICES}
    shown = subprocess.run(
        [sys.executable, "-c", _DISPLAY],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "GOMP_SPINCOUNT = '10000'" in shown.stderr


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_choice_of_the_user_is_left_alone(name: str) -> None:
    environment = {name: "7"}
    openmp_waiting.install(environment)
    assert environment == {name: "7"}
