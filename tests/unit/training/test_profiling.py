"""--profile with torch's profiler: the trace in TensorBoard's directory holds the steps that the flags name."""

import json
from pathlib import Path

import pytest

from tests.unit.training.test_mock_data import RUNS, train_here

SCRIPT = "pretrain_gpt_per_layer.py"
PROFILE = "--profile --use-pytorch-profiler --profile-step-start 3 --profile-step-end 5 --eval-iters 0"


def _names(trace: Path) -> list[str]:
    return [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event]


@pytest.mark.parametrize(
    ("flags", "steps", "has_shapes"),
    [
        ("--train-iters 6", 2, False),
        (
            "--train-iters 3 --pytorch-profiler-collect-shapes",
            1,
            True,
        ),  # the run ends before --profile-step-end
        ("--train-iters 6 --profile-ranks 1", 0, False),
    ],
)
def test_the_trace_can_be_read_back_and_holds_the_named_steps(
    flags: str, steps: int, has_shapes: bool, tmp_path: Path
) -> None:
    own = RUNS[SCRIPT].replace("--train-iters 2", flags)
    train_here(SCRIPT, f"{own} {PROFILE} --tensorboard-dir {tmp_path}")
    traces = list(tmp_path.glob("rank_0.*.pt.trace.json"))
    assert len(traces) == (1 if steps else 0)
    for trace in traces:
        names = _names(trace)
        assert sum(name.startswith("ProfilerStep#") for name in set(names)) == steps
        assert names.count("Optimizer.step#AdamW.step") == steps
        assert "aten::mm" in names
        assert ("Input Dims" in trace.read_text()) == has_shapes
