"""The data tools' main job, small: every command of the script runs; every dataset it makes is verified and read."""

import os
import subprocess
from pathlib import Path

from megatron_ext.data.per_layer.strategies import STRATEGIES
from megatron_ext.testing.warm_python.warm_server import warm_variables

SCRIPT = Path(__file__).parents[3] / "examples" / "data" / "main_job.sh"


def test_the_main_job_makes_verifies_and_trains_on_data_of_every_strategy(tmp_path: Path) -> None:
    sizes = {
        "SIZE_GB": "0.0006",
        "CORPUS_BYTES": "300000",
        "VOCAB_SIZE": "512",
        "PER_LAYER_VOCAB_SIZE": "200",
        "TRAIN_ITERS": "2",
    }
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**mine, **sizes, **warm_variables(), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", str(SCRIPT), "--device-peak-tflops", "1", "--num-workers", "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "train.jsonl").stat().st_size >= 600_000
    for name in ("train", *STRATEGIES):
        assert f"{tmp_path}/{name}_text_document: ok" in result.stdout
    for strategy in STRATEGIES:
        assert f"per-layer ids: all are what {strategy} gives" in result.stdout
    assert "step 2/2 | lm loss" in result.stdout
