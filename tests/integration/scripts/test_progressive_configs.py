"""The example files are valid command lines, say what their names promise, and fit a trial of a few steps."""

from pathlib import Path

import pytest

from megatron_ext.config.command_line.parse import parse
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults

FOLDER = Path(__file__).parents[3] / "examples" / "progressive"
REST = ["--data-path", "corpus", "--tokenizer-type", "ByteLevelTokenizer", "--save", "racks"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "append_frozen",
            {"trunk_strategy": "frozen", "building_mode": ("append",), "cache_activations": True},
        ),
        ("qlora_trunk", {"trunk_strategy": "qlora", "trunk_precision": "qlora", "joint_steps": 50}),
        ("prepend_masked", {"building_mode": ("prepend",), "training_objective": "mlm"}),
    ],
)
def test_an_example_file_parses_to_what_it_promises(name: str, expected: dict[str, object]) -> None:
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), *REST]
    config = parse(ProgressiveRunConfig, arguments, find=lambda given: [stack_defaults(given)])
    found = vars(config.progressive)
    assert {key: found[key] for key in expected} == expected
    assert config.progressive.num_stacks == 3
    assert config.model.untie_embeddings_and_output_weights


@pytest.mark.parametrize("name", ["append_frozen", "qlora_trunk", "prepend_masked"])
def test_a_trial_of_few_steps_needs_no_other_warm_up(name: str) -> None:
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), *REST, "--stack-steps", "5"]
    config = parse(ProgressiveRunConfig, arguments, find=lambda given: [stack_defaults(given)])
    optimizer = config.optimizer
    assert optimizer.lr_warmup_fraction == 20 / 200 and optimizer.lr_warmup_iters == 0


def test_a_trial_of_few_steps_fits_the_schedule_of_the_quick_start() -> None:
    path = FOLDER.parent / "gpt_per_layer" / "quickstart.yaml"
    config = parse(PerLayerRunConfig, ["--config", str(path), *REST, "--train-iters", "5"])
    assert config.resolved(2).optimizer.lr_warmup_fraction == 20 / 200
