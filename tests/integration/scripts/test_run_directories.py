"""--save and --load as users and schedulers give them: the scripts on one and two ranks, with their loader workers."""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.torchrun import environment
from megatron_ext.training.checkpoint import checkpoint_files as files
from tests.integration.scripts.test_pretrain_gpt_per_layer import losses

ROOT = Path(__file__).parents[3]
SHAPE = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --swiglu --disable-bias-linear "
    "--hidden-dropout 0.1 --attention-dropout 0.1 --tokenizer-type NullTokenizer --vocab-size 64"
)
TRAINING = shlex.split(
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --log-interval 1 "
    "--device-peak-tflops 1"
)
GROWTH = shlex.split("--n-blocks 1 --stack-steps 1 --training-objective clm --no-qlora-enabled")
LINE = "error: "


def start(script: str, *flags: str, processes: int = 1, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and what was printed, errors at last."""
    if prefix:
        command = [*prefix, sys.executable, str(ROOT / script), *flags]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    else:
        result = run_script(script, *flags, processes=processes)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.integration.npt.npt_run_helpers import write_data

    return write_data(tmp_path_factory.mktemp("data"))


def pretrain(data: str, *flags: str, processes: int = 1, shape: bool = True) -> tuple[int, str]:
    own = SHAPE if shape else []
    return start(
        "pretrain_gpt_per_layer.py", *own, *TRAINING, "--data-path", data, *flags, processes=processes
    )


def message(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(LINE)]
    return line


def content(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, output = pretrain(
        data, "--train-iters", "6", "--save-interval", "2", "--save", str(folder), processes=2
    )
    assert code == 0, output
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it that must be the same, to the byte, after the test."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = content(folder)
    yield folder
    assert content(folder) == before


def test_a_second_run_into_the_same_directory_is_refused_on_every_rank(data: str, copy: Path) -> None:
    code, output = pretrain(data, "--train-iters", "3", "--save", str(copy), processes=2)
    assert code == 2 and "step 1/3" not in output
    assert message(output).startswith(
        f"error: --save {copy}: contains another run (steps 2, 4, 6); to continue"
    )


def test_a_run_from_elsewhere_a_finetuning_and_an_earlier_step_are_refused_too(data: str, copy: Path) -> None:
    elsewhere = copy.parent / "elsewhere"
    shutil.copytree(copy, elsewhere)
    for flags, told in (
        (["--load", str(elsewhere)], "contains another run (steps 2, 4, 6)"),
        (["--load", str(copy), "--finetune"], "without --finetune"),
        (["--load", str(copy), "--ckpt-step", "2"], "steps 4, 6, which are later than the loaded step 2"),
    ):
        code, output = pretrain(data, "--train-iters", "9", "--save", str(copy), *flags)
        assert (code, told in message(output)) == (2, True), output


def test_the_same_command_starts_goes_on_and_ends_as_the_run_that_never_stopped(
    data: str, tmp_path: Path
) -> None:
    """As a job that Slurm puts back into its queue."""
    straight = [
        "--train-iters", "6", "--save", f"{tmp_path}/straight", "--tensorboard-dir", f"{tmp_path}/curves"
    ]  # fmt: skip
    assert pretrain(data, *straight, processes=2)[0] == 0
    place = f"{tmp_path}/run"
    requeued = [
        "--train-iters",
        "6",
        "--save",
        place,
        "--load",
        place,
        "--tensorboard-dir",
        f"{place}/curves",
    ]
    code, first = pretrain(data, *requeued, "--exit-interval", "4", processes=2)
    assert code == 0 and f"--load {place}: no checkpoint found; the run starts from scratch" in first
    code, second = pretrain(data, *requeued, processes=2)
    assert code == 0 and "the run continues after step 4" in second
    assert losses(Path(place, "curves")) == losses(tmp_path / "curves")
    code, third = pretrain(data, *requeued, processes=2)
    assert code == 0 and "training is already complete: step 6 of 6" in third
    assert (
        "to continue, increase --train-iters (--max-steps), with --override-opt-param-scheduler if" in third
    )


def test_overwriting_must_be_said_and_leaves_the_new_run_alone(data: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    code, output = pretrain(data, "--train-iters", "1", "--save", str(folder), "--overwrite-checkpoints")
    assert code == 0, output
    assert sorted(os.listdir(folder)) == ["iter_0000001", files.TRACKER]
    assert (folder / files.TRACKER).read_text() == "1"


def test_what_a_load_cannot_read_is_no_new_run(data: str, tmp_path: Path) -> None:
    (tmp_path / "iter_0000020").mkdir()
    (tmp_path / "iter_0000020" / ".metadata").write_bytes(b"Megatron-LM's")
    (tmp_path / files.TRACKER).write_text("20")
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text('{"model_type": "llama"}')
    for path, told in (
        (tmp_path / "iter_0000020", "a checkpoint of Megatron-LM"),
        (hugging_face, "tools/convert_checkpoint.py import"),
    ):
        for script, flags in (
            ("pretrain_gpt_per_layer.py", [*SHAPE, *TRAINING, "--train-iters", "1", "--data-path", data]),
            ("pretrain_npt.py", [*TRAINING, "--train-iters", "1", "--data-path", data]),
            ("tools/evaluate.py", ["--data-path", data]),
            ("tools/generate.py", ["--prompt", "1 2"]),
            ("tools/evaluate_npt.py", ["--data-path", data]),
        ):
            code, output = start(script, "--load", str(path), *flags)
            assert (code, told in message(output)) == (2, True), (script, output)


def test_load_alone_brings_the_shape_and_a_longer_run_needs_one_more_flag_which_is_named(
    data: str, run: Path, tmp_path: Path
) -> None:
    cosine = ["--lr-decay-style", "cosine", "--save", str(tmp_path / "more"), "--load", str(run)]
    code, output = pretrain(data, "--train-iters", "8", *cosine, shape=False)
    assert code == 2
    assert "--train-iters 8, --lr-decay-style cosine: the schedule in" in message(output)
    assert (
        "was made with 6, constant; to continue with this run's schedule, add --override-opt-param-scheduler"
        in message(output)
    )
    code, output = pretrain(
        data, "--train-iters", "8", *cosine, "--override-opt-param-scheduler", shape=False
    )
    assert code == 0 and "the run continues after step 6" in output, output
    stored = json.loads((tmp_path / "more" / "iter_0000008" / files.RUN_CONFIG).read_text())
    assert stored["model"] == json.loads((run / "iter_0000006" / files.RUN_CONFIG).read_text())["model"]


def test_tools_say_which_step_they_read(data: str, run: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/evaluation.json"
    code, printed = start(
        "tools/evaluate.py", "--load", str(run), "--ckpt-step", "4", "--data-path", data, "--output", output
    )
    assert code == 0 and f"{run}/iter_0000004: step 4\n" in printed
    assert json.loads(Path(output).read_text())[data]["step"] == 4
    code, printed = start("tools/generate.py", "--load", str(run), "--prompt", "1 2", "--max-new-tokens", "2")
    assert code == 0 and f"{run}/iter_0000006: step 6\n" in printed


def test_another_tokenizer_is_told_by_class_size_and_files(data: str, run: Path) -> None:
    code, output = pretrain(data, "--train-iters", "8", "--load", str(run), "--vocab-size", "70")
    assert code == 2
    assert "(NullTokenizer, 65 ids, fingerprint " in message(output)
    assert "than this run's (NullTokenizer, 71 ids, fingerprint " in message(output)


def test_npt_without_a_checkpoint_asks_for_one(data: str) -> None:
    code, output = start("pretrain_npt.py", "--mode", "multi_layer", "--data-path", data)
    assert (
        code,
        message(output).startswith("error: --load is missing: give the checkpoint of the base model"),
    ) == (
        2,
        True,
    )


def test_npt_and_progressive_runs_do_not_write_into_another_runs_directory(
    data: str, run: Path, copy: Path
) -> None:
    npt = [*TRAINING, "--train-iters", "2", "--np-rank", "4", "--data-path", data]
    for script, flags in (
        ("pretrain_npt.py", [*npt, "--mode", "multi_layer", "--load", str(run), "--save", str(copy)]),
        ("pretrain_npt.py", [*npt, "--mode", "multi_layer", "--load", str(copy), "--save", str(copy)]),
        ("pretrain_npt.py", [*npt, "--mode", "lm", "--load", str(run), "--save", str(copy)]),
        (
            "pretrain_npt.py",
            [*npt[:-4], "--data-path", data, "--mode", "sequential", "--train-iters", "2000", "--load", str(run),
             "--checkpoint-dir", str(copy)],
        ),
        (
            "pretrain_progressive.py",
            [*TRAINING, *GROWTH, *SHAPE[2:], "--data-path", data, "--target-stacks", "2", "--save", str(copy)],
        ),
    ):  # fmt: skip
        code, output = start(script, *flags)
        assert (code, f"--save {copy}: contains another run (steps 2, 4, 6)" in message(output)) == (
            2,
            True,
        ), output


def as_a_user() -> tuple[str, ...]:
    """Prefix of a command without root's right to pass over permissions."""
    if os.geteuid():
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere here")
    return "setpriv", "--bounding-set", "-dac_override,-dac_read_search"


def test_read_only_data_and_checkpoints_are_enough_to_train_and_evaluate(
    data: str, copy: Path, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    for end in (".bin", ".idx"):
        shutil.copy(f"{data}{end}", place)
    prefix, user = f"{place}/corpus", as_a_user()
    folders = [place, *(path for path in [copy, *copy.rglob("*")] if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        flags = [*TRAINING, "--train-iters", "7", "--load", str(copy), "--data-path", prefix]
        flags += ["--save", str(tmp_path / "new")]
        code, output = start("pretrain_gpt_per_layer.py", *flags, prefix=user)
        assert code == 0 and "saved step 7" in output, output
        assert (
            f"note: {place}/index_cache: Permission denied; every process builds the sample indices" in output
        )
        code, output = start("tools/evaluate.py", "--load", str(copy), "--data-path", prefix, prefix=user)
        assert code == 0, output
        flags[-1] = str(copy)
        code, output = start(
            "pretrain_gpt_per_layer.py", *flags, "--data-cache-path", f"{tmp_path}/cache", prefix=user
        )
        assert code == 2 and f"--save {copy}: not writable: Permission denied" in message(output)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_disk_that_fills_up_ends_a_run_which_goes_on_when_there_is_room(
    data: str, small_disk: Path
) -> None:
    place = f"{small_disk}/run"
    flags = ["--train-iters", "8", "--save-interval", "2", "--save", place, "--load", place]
    code, output = pretrain(data, *flags, processes=2)
    assert code != 0
    assert "could not be written (No space left on device); its files were removed" in message(output)
    saved = int(Path(place, files.TRACKER).read_text())
    assert 0 < saved < 8 and set(os.listdir(place)) == {
        files.TRACKER,
        *map(files.checkpoint_name, range(2, saved + 1, 2)),
    }
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    code, output = pretrain(data, *flags, processes=2)
    assert code == 0 and f"the run continues after step {saved}" in output


def test_a_full_disk_for_the_index_of_the_samples_is_named(data: str, small_disk: Path) -> None:
    # More than there is room for.
    fill = ["dd", "if=/dev/zero", f"of={small_disk}/fill", "bs=1k", "count=2000"]
    assert subprocess.run(fill, capture_output=True, check=False).returncode == 1
    code, output = pretrain(
        data, "--train-iters", "2", "--data-cache-path", f"{small_disk}/cache", processes=2
    )
    assert code != 0 and f"{small_disk}/cache: the sample index" in message(output)
    assert "No space left on device" in message(output)


def test_a_growth_goes_on_with_the_shape_that_is_in_its_directory(data: str, tmp_path: Path) -> None:
    place = f"{tmp_path}/racks"
    flags = [*TRAINING, "--data-path", data, "--save", place, *GROWTH]
    code, output = start("pretrain_progressive.py", *flags, *SHAPE[2:], "--target-stacks", "1")
    assert code == 0, output
    code, output = start("pretrain_progressive.py", *flags, "--target-stacks", "2")
    assert code == 0 and "the rack is complete" in output, output
    stored = [
        json.loads(next(Path(place, name).glob(f"*/{files.RUN_CONFIG}")).read_text())["model"]
        for name in ("progressive_stack_0", "progressive_stack_1")
    ]
    assert stored[1].pop("num_layers") == 2 * stored[0].pop("num_layers") == 2
    assert stored[0] == stored[1]
    code, output = start("pretrain_progressive.py", *flags, "--target-stacks", "2", "--overwrite-checkpoints")
    assert code == 2 and "--overwrite-checkpoints: not supported, because progressive training" in message(
        output
    )


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed here")
def test_a_run_that_asked_for_transformer_engine_is_read_where_that_is_missing(
    data: str, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "iter_0000006"
    shutil.copytree(run / "iter_0000006", folder)
    stored = json.loads((folder / files.RUN_CONFIG).read_text())
    stored["model"] |= {"transformer_impl": "transformer_engine", "attention_backend": "te"}
    stored["model"] |= {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
    (folder / files.RUN_CONFIG).write_text(json.dumps(stored))
    manifest = json.loads((folder / files.CHECKSUMS).read_text())["files"]
    files.write_checksums(folder, manifest | files.digests(folder, [files.RUN_CONFIG]))
    for place in (run, folder):
        output = f"{tmp_path}/{place.parent.name}.json"
        code, printed = start(
            "tools/evaluate.py", "--load", str(place), "--data-path", data, "--output", output
        )
        assert code == 0, printed
    ours, theirs = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert ours == theirs
    code, printed = pretrain(data, "--train-iters", "7", "--load", str(folder), shape=False)
    assert code == 0 and "step 7/7" in printed, printed
