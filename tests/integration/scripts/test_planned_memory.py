"""A run that cannot fit into the machine is refused within seconds, before anything large is allocated."""

import resource
from pathlib import Path

import pytest

from megatron_ext.platform.device_memory import host_memory
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 99 "
    "--num-workers 0 --eval-iters 1 --split 80,15,5"
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "data")
    write_dataset(path, [[list(range(50))] for _ in range(60)])
    return path


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # torch alone maps several


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--seq-length 50000000 --train-iters 10",
            ["--seq-length 50000000, --micro-batch-size 1", "activations"],
        ),
        ("--seq-length 16 --train-iters 10 --micro-batch-size 9999999", ["--micro-batch-size 9999999"]),
        (
            "--seq-length 16 --train-iters 10 --ffn-hidden-size 9999999999",
            ["--num-layers 2, --hidden-size 32"],
        ),
        ("--seq-length 16 --train-iters 999999999999", ["999,999,999,999 training samples", "--train-iters"]),
        ("--seq-length 16 --train-iters 9 --eval-iters 999999999999", ["validation samples", "--eval-iters"]),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2_without_allocating_it(
    flags: str, words: list[str], prefix: str
) -> None:
    given = [*FLAGS.split(), *flags.split(), "--data-path", prefix]
    done = run_script("pretrain_gpt_per_layer.py", *given, before=_limit)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "this machine has" in errors[0]
    for word in words:
        assert word in errors[0]


def test_a_copy_for_saves_that_does_not_fit_beside_the_run_is_one_line_that_names_the_flag(
    prefix: str, tmp_path: Path
) -> None:
    # In a step the word embedding and the output layer need 16 bytes per weight, and 12 more in the copy.
    hidden, matrices = 128, 2
    rows = int(0.8 * host_memory() / 16 / hidden / matrices)
    shape = (
        f"--vocab-size {rows} --hidden-size {hidden} --untie-embeddings-and-output-weights --seq-length 16"
    )
    given = [*FLAGS.split(), *shape.split(), "--train-iters", "9", "--data-path", prefix]
    given += ["--save", str(tmp_path), "--async-save"]
    done = run_script("pretrain_gpt_per_layer.py", *given, before=_limit)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(
        "error: --async-save: a step and the copy of the saved tensors need"
    )
