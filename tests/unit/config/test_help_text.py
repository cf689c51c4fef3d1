"""What `--help` prints: its order, its width, its texts."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_ext.config.command_line.flag_table import flags_of, groups_of, known_flags
from megatron_ext.config.command_line.help_text import field_docs
from megatron_ext.config.command_line.parse import parse
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig


def shown(config_type: type[Any], capsys: pytest.CaptureFixture[str], **supplied: str) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        parse(config_type, ["--help"], prog="test", supplied=supplied)
    assert caught.value.code == 0
    return capsys.readouterr().out.split("\n")


def test_required_flags_stand_first_and_then_the_familys_own_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(NPTRunConfig, capsys, num_layers="that of --load")
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:5] == ["options:", "required:", "npt options:", "np options:", "model options:"]
    required = lines[lines.index("required:") : lines.index("npt options:")]
    flags = [line.split()[0].rstrip(",") for line in required if line.startswith("  --")]
    assert flags == ["--hidden-size", "--num-attention-heads", "--seq-length", "--lr"]


def test_megatrons_name_stands_before_an_alias(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip() for line in shown(NPTRunConfig, capsys)]
    for start in (
        "--micro-batch-size, --batch-size INT",
        "--lr, --learning-rate FLOAT",
        "--np-rank, --rank TEXT",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_lines_are_wrapped_at_the_terminals_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, widest in ((80, 80), (100, 100), (300, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lengths = [len(line) for line in shown(NPTRunConfig, capsys)]
        assert widest - 8 <= max(lengths) <= widest


@pytest.mark.parametrize("config_type", [PerLayerRunConfig, NPTRunConfig, ProgressiveRunConfig])
def test_every_flag_has_the_text_of_its_field(config_type: type[NPTRunConfig]) -> None:
    docs = {name: field_docs(group) for name, group in groups_of(config_type).items()}
    assert not [flag.name for flag in flags_of(config_type) if not docs[flag.group].get(flag.field)]


@dataclass(frozen=True, kw_only=True)
class _WithoutSwitches:
    """Flags of a tool."""

    size: int = 1
    """A size."""


def test_negations_are_explained_with_a_switch_of_this_program_and_only_if_it_has_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = re.search(
        r"--no-SWITCH +Turn off .*? for +example + (--no-[a-z-]+)\.", " ".join(shown(NPTRunConfig, capsys))
    )
    assert found
    assert found[1] in known_flags(NPTRunConfig)
    assert not [line for line in shown(_WithoutSwitches, capsys) if "--no" in line]
