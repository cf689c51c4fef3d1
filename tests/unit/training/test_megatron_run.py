"""A run with the settings of Megatron-LM's users, all at once; stopped within the ramp, it goes on bit for bit."""

import json
from pathlib import Path
from typing import Any

from tests.unit.training.test_mock_data import RUNS, train_here

SCRIPT = "pretrain_gpt_per_layer.py"
SETTINGS = (
    "--fp16 --initial-loss-scale 16384 --loss-scale-window 3 --hysteresis 1 --squared-relu --recompute-activations "
    "--decoupled-lr 5e-3 --micro-batch-size 1 --global-batch-size 6 --rampup-batch-size 2 2 12 --train-samples 42 "
    "--lr-warmup-samples 8 --lr-decay-style cosine --log-num-zeros-in-grad --accumulate-allreduce-grads-in-fp32 "
    "--empty-unused-memory-level 1 --no-calculate-per-token-loss --eod-mask-loss --hidden-dropout 0.1"
)
SIZES = [2, 2, 2, 4, 4, 6, 6, 6, 6]
"""Six samples for each increment, and four left over."""


def _checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """State and checksums of the last checkpoint; the configuration differs between the runs."""
    (last,) = folder.glob(f"iter_{len(SIZES):07d}")
    checksums = json.loads((last / "checksums.json").read_text())
    files = checksums.get("files", checksums)
    return json.loads((last / "state.json").read_text()), {
        name: digest for name, digest in files.items() if name.endswith(".distcp") or "rank_" in name
    }


def test_a_run_stopped_within_the_ramp_goes_on_to_the_weights_of_the_run_that_never_stopped(
    tmp_path: Path,
) -> None:
    flags = f"{RUNS[SCRIPT].replace('--train-iters 2', SETTINGS)}"
    straight = train_here(SCRIPT, f"{flags} --save {tmp_path / 'straight'}")
    parts = f"{flags} --save {tmp_path / 'parts'}"
    losses = train_here(SCRIPT, f"{parts} --exit-interval 4")
    assert losses and straight.startswith(losses)
    losses += "\n" + train_here(SCRIPT, f"{parts} --load {tmp_path / 'parts'}")
    assert losses == straight
    (state, digests), (resumed, resumed_digests) = map(
        _checkpoint, (tmp_path / "straight", tmp_path / "parts")
    )
    assert state == resumed and digests == resumed_digests and len(digests) == 2
    assert state["progress"]["consumed_samples"] == sum(SIZES)
    skipped = state["progress"]["skipped_steps"]
    assert 0 < skipped < 6 and state["scheduler"]["num_steps"] < sum(SIZES)
    assert set(state["loss_scale"]) == {"scale", "growth_tracker", "hysteresis_tracker"}
