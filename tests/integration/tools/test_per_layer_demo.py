"""The check of a setup says what it found, and fails when per-layer embedding does not learn."""

import pytest

from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.testing.forked_scripts import run_script
from tools.per_layer_demo import MODEL, SHOWN, report

SETTINGS = PerLayerConfig(use_per_layer_embedding=True)


def test_the_demo_trains_and_reports_every_layer() -> None:
    result = run_script("tools/per_layer_demo.py", "--per-layer-combination-method", "gated")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert lines[-1] == "per-layer embedding works"


@pytest.mark.parametrize(
    ("changes", "losses", "code", "told"),
    [
        ({}, [4.0, 3.0], 0, "works"),
        ({"embedding-gradient-norm": 0.0}, [4.0, 3.0], 1, "no gradient"),
        ({"gradient-norm": float("nan")}, [4.0, 3.0], 1, "no gradient"),
        ({}, [4.0, 4.0], 1, "does not fall"),
    ],
)
def test_a_layer_without_gradient_or_a_loss_that_stays_is_a_failure(
    changes: dict[str, float], losses: list[float], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dict.fromkeys(SHOWN, 1.0) | changes
    layers = range(MODEL.num_layers)
    statistics = {f"per-layer/{name}/layer_{layer:02d}": v for name, v in values.items() for layer in layers}
    assert report(SETTINGS, losses, statistics) == code
    assert told in capsys.readouterr().out.splitlines()[-1]
