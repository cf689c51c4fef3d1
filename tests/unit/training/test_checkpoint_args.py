"""--use-checkpoint-args: the model's shape is the checkpoint's, and given flags that differ are named."""

import importlib
import re
from pathlib import Path

import pytest

from megatron_ext.testing.torchrun import ROOT

KEPT = "tests/integration/scripts/kept_checkpoint"
"""A checkpoint of a PLE model of 2 layers and width 16, with as many key/value heads as heads."""

OTHERS = (
    f"--load {KEPT} --num-layers 7 --hidden-size 48 --num-query-groups 1 --seq-length 8 --hidden-dropout 0.3"
)


def shown(
    script: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, str], list[str]]:
    """Values that `--show-config` prints, and the lines before them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, *line.split(), "--show-config"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script.removesuffix(".py")).main()
    output, errors = capsys.readouterr()
    assert ended.value.code == 0, errors
    before, _, table = output.partition("model:\n")
    return dict(re.findall(r"^  (\w+) +(\S+)", table, re.MULTILINE)), before.splitlines()


@pytest.mark.parametrize("script", ["pretrain_gpt_per_layer.py", "pretrain_npt.py"])
def test_the_checkpoints_shape_replaces_given_flags_and_they_are_named(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{OTHERS} --lr 1 --train-iters 3"
    values, notes = shown(script, f"{line} --use-checkpoint-args", monkeypatch, capsys)
    shape = {"num_layers": "2", "hidden_size": "16", "num_query_groups": "none", "ffn_hidden_size": "24"}
    assert {name: values[name] for name in shape} == shape
    assert (values["seq_length"], values["hidden_dropout"]) == ("8", "0.3")  # these are not the shape
    told = "--num-layers 2, not 7; --hidden-size 16, not 48; --num-query-groups its default, not 1"
    assert [note.partition(" has ")[2] for note in notes] == [f"{told} (--use-checkpoint-args)"]
    values, notes = shown(script, line, monkeypatch, capsys)
    assert values["num_layers"] == "7" and not notes


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("pretrain_gpt_per_layer.py", "--num-layers 2"),
        ("pretrain_npt.py", "--num-layers 2"),
        ("pretrain_progressive.py", "--stack-steps 3"),
    ],
)
def test_without_the_name_of_a_checkpoint_it_is_refused(
    script: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [script, *line.split(), "--use-checkpoint-args"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main()
    assert "--use-checkpoint-args: requires --" in capsys.readouterr().err


def test_before_the_first_checkpoint_the_flags_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--num-layers 7 --hidden-size 48 --num-attention-heads 2 --seq-length 8 --lr 1 --train-iters 3"
    where = f"--load {tmp_path} --save {tmp_path} --use-checkpoint-args --tokenizer-type ByteLevelTokenizer"
    values, notes = shown("pretrain_gpt_per_layer.py", f"{line} {where}", monkeypatch, capsys)
    assert values["num_layers"] == "7" and not notes
