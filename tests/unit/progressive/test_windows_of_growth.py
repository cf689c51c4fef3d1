"""A layer keeps its sliding window, or none, as a model grows; flags that would change it are refused by name."""

import pytest

from megatron_ext.config.command_line.parse import parse
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults

FLAGS = (
    "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --stack-steps 1 --lr 1e-3 --save x --data-path x "
    "--tokenizer-type NullTokenizer --vocab-size 60 --max-stacks 3 --target-stacks 3 --window-size 7,0 "
)


def _parsed(flags: str) -> ProgressiveRunConfig:
    return parse(ProgressiveRunConfig, (FLAGS + flags).split(), find=lambda given: [stack_defaults(given)])


@pytest.mark.parametrize(
    "flags",
    [
        "--n-blocks 2",
        "--n-blocks 3 --window-attn-skip-freq 2",
        "--n-blocks 4 --building-mode prepend --window-attn-skip-freq 2 --no-rope-freq 4",
        "--n-blocks 3 2 4 --building-mode append prepend --window-attn-skip-freq 2",
    ],
)
def test_windows_that_stay_with_their_layers_are_accepted(flags: str) -> None:
    assert _parsed(f"--training-objective clm {flags}").model.window_size == "7,0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-blocks 2", "--window-size 7,0: requires --training-objective clm (got mlm"),
        (
            "--training-objective clm --n-blocks 1 --window-attn-skip-freq [1]",
            "--window-attn-skip-freq [1]: must be a number in progressive training",
        ),
        (
            "--training-objective clm --n-blocks 3 --building-mode prepend --window-attn-skip-freq 2",
            "--window-attn-skip-freq 2: must divide --n-blocks 3 with --building-mode prepend",
        ),
        (
            "--training-objective clm --n-blocks 2 4 3 --building-mode append prepend --window-attn-skip-freq 2",
            "--window-attn-skip-freq 2: must divide --n-blocks 3 with --building-mode prepend",
        ),
        (
            "--training-objective clm --n-blocks 3 --building-mode prepend --no-rope-freq 2",
            "--no-rope-freq 2: must divide --n-blocks 3 with --building-mode prepend",
        ),
        (
            "--training-objective clm --n-blocks 1 --no-rope-freq [1]",
            "--no-rope-freq [1]: must be a number in progressive training",
        ),
    ],
)
def test_windows_that_would_move_to_other_layers_are_refused_in_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_refused(flags, message, capsys)


@pytest.mark.parametrize("flag", ["--altup-streams 2", "--mlp-activation-sparsity 0.5"])
def test_residual_streams_and_sparse_gates_are_refused_in_one_line(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--training-objective clm --n-blocks 2 --swiglu {flag}"
    _check_refused(flags, f"{flag}: not supported by progressive training", capsys)


def _check_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        _parsed(flags)
    assert left.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1
