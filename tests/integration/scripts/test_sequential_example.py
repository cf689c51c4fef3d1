"""The sequential example makes its tiny base model and data, trains layer by layer, and leaves a model that loads."""

import importlib.util
import json
from pathlib import Path

from tests.integration.scripts.test_small_example import EXAMPLES, bash
from tests.unit.interop.hf_models import alone

SCRIPT = str(EXAMPLES / "npt" / "run_sequential_training.sh")


def _generate(folder: str) -> tuple[tuple[int, ...], str]:
    specification = importlib.util.spec_from_file_location("load_model", f"{folder}/load_model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.load_model()
    return model.npt_layers, model.generate("The function", max_new_tokens=4, temperature=0)


def test_the_demo_trains_from_nothing_and_its_load_model_generates(tmp_path: Path) -> None:
    flags = ["--demo", "--layers", "0,2", "--steps", "4", "--eval-iters", "0", "--device-peak-tflops", "1"]
    result = bash(SCRIPT, *flags, RUN=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    info = json.loads((tmp_path / "sequential" / "training_info.json").read_text())
    assert info["trained_layers"] == [0, 2] and info["np"]["np_rank"] == 16
    layers, text = alone(_generate, str(tmp_path / "sequential"))
    assert layers == (0, 2) and isinstance(text, str)


def test_a_flag_without_its_value_is_told() -> None:
    result = bash(SCRIPT, "--demo", "--steps")
    assert result.returncode == 2 and result.stderr == "error: --steps: requires a value\n"
