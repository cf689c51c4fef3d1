"""The example files of progressive training are valid command lines, and say what their names promise."""

from pathlib import Path

import pytest

from megatron_ext.config.command_line.parse import parse
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
