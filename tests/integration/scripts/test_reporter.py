"""What a run prints and writes: read back with TensorBoard's own reader."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.platform.peak_rate import DevicePeak
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.logging.tensorboard_writer import SAMPLES_FOLDER
from tests.unit.training.reporting_helpers import BATCH, FLOPS_PER_TOKEN, TOKENS, Terminal, metrics

PEAK_TFLOPS = 0.5


def reporter(stream: io.StringIO, total: int = 4, **options: Any) -> Reporter:
    settings: dict[str, Any] = {"log_interval": 2, "device_peak_tflops": PEAK_TFLOPS}
    settings |= {name: options.pop(name) for name in list(options) if hasattr(LoggingConfig, name)}
    options = {"world_size": 2, "rank": 0} | options
    return Reporter(
        LoggingConfig(**settings),
        total_iterations=total,
        stream=stream,
        **options,
    )


def scalars(directory: Path, tag: str) -> dict[int, float]:
    """Step -> value, as TensorBoard shows the curve."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def tags(directory: Path) -> set[str]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Four steps, an evaluation and statistics."""
    with reporter(io.StringIO(), tensorboard_dir=str(tmp_path), log_memory=True) as report:
        for iteration in range(1, 5):
            report.step(iteration, metrics(iteration, params_norm=7.0))
            report.statistics(iteration, {"per-layer/gate mean/layer 0": 0.25 * iteration})
        report.validation(4, {"lm loss": 2.0, "mlp loss/layer_1": 0.5}, consumed_samples=4 * BATCH)
    return tmp_path


def test_tags_are_megatrons(written: Path) -> None:
    of_steps = {"lm loss", "learning-rate", "batch-size", "grad-norm", "params-norm"}
    of_intervals = {"iteration-time", "throughput", "tokens-per-second", "mfu", "consumed-samples"}
    memory = {"mem-allocated-bytes", "mem-max-allocated-bytes", "mem-reserved-bytes"}
    counts = {"skipped-iterations", "nan-iterations"}
    evaluation = {"lm loss validation", "lm loss validation ppl", "mlp loss/layer_1 validation"}
    statistics = {"per-layer/gate mean/layer 0"}
    assert tags(written) == of_steps | of_intervals | memory | counts | evaluation | statistics
    by_samples = of_steps | evaluation
    assert tags(written / SAMPLES_FOLDER) == {f"{tag} vs samples" for tag in by_samples}


def test_values_of_steps_are_written_at_every_step(written: Path) -> None:
    for tag, value in (
        ("lm loss", lambda i: 4.0 / i),
        ("grad-norm", lambda i: 0.5 * i),
        ("learning-rate", lambda i: 1e-3 / i),
        ("batch-size", lambda i: BATCH),
        ("params-norm", lambda i: 7.0),
        ("per-layer/gate mean/layer 0", lambda i: 0.25 * i),
    ):
        assert scalars(written, tag) == pytest.approx({i: value(i) for i in range(1, 5)})
    by_samples = scalars(written / SAMPLES_FOLDER, "lm loss vs samples")
    assert by_samples == pytest.approx({i * BATCH: 4.0 / i for i in range(1, 5)})


def test_speed_is_a_mean_over_the_interval(written: Path) -> None:
    # steps take 0.1 s and 0.2 s in turn
    tokens_per_second = 2 * TOKENS / 0.3
    assert scalars(written, "iteration-time") == pytest.approx({2: 0.15, 4: 0.15})
    assert scalars(written, "tokens-per-second")[2] == pytest.approx(tokens_per_second)
    tflops = tokens_per_second * FLOPS_PER_TOKEN / 2 / 1e12  # a device, of two
    assert scalars(written, "throughput")[2] == pytest.approx(tflops)
    assert scalars(written, "mfu")[2] == pytest.approx(tflops / PEAK_TFLOPS)


def test_validation_perplexity_is_the_losss_exponential(written: Path) -> None:
    assert scalars(written, "lm loss validation") == {4: 2.0}
    assert scalars(written, "lm loss validation ppl") == pytest.approx({4: math.exp(2.0)})


def test_the_configuration_is_written_as_text(tmp_path: Path) -> None:
    logging = LoggingConfig(log_interval=17)
    with reporter(io.StringIO(), tensorboard_dir=str(tmp_path), configuration={"logging": logging}):
        pass
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("configuration/logging/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    values = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert values["log_interval"] == 17


def test_tensorboard_log_interval_thins_out_the_steps(tmp_path: Path) -> None:
    with reporter(io.StringIO(), 6, tensorboard_dir=str(tmp_path), tensorboard_log_interval=3) as report:
        for iteration in range(1, 7):
            report.step(iteration, metrics(iteration))
    assert set(scalars(tmp_path, "lm loss")) == {3, 6}


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    """Killed after step 6, resumed from the checkpoint of step 4: one curve, the second run's where both have one."""
    with reporter(io.StringIO(), 8, tensorboard_dir=str(tmp_path)) as report:
        for iteration in range(1, 7):
            report.step(iteration, metrics(iteration, loss=1.0))
    resumed = {"iteration": 4, "consumed_samples": 4 * BATCH}
    with reporter(io.StringIO(), 8, tensorboard_dir=str(tmp_path), **resumed) as report:
        for iteration in range(5, 9):
            report.step(iteration, metrics(iteration, loss=2.0))
    expected = {i: 1.0 if i <= 4 else 2.0 for i in range(1, 9)}
    assert scalars(tmp_path, "lm loss") == expected
    by_samples = scalars(tmp_path / SAMPLES_FOLDER, "lm loss vs samples")
    assert by_samples == {i * BATCH: value for i, value in expected.items()}


def test_a_killed_run_keeps_its_finished_intervals(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from megatron_ext.config.groups.logging_config import LoggingConfig;"
        "from megatron_ext.training.logging.reporter import Reporter;"
        "from tests.unit.training.reporting_helpers import metrics;"
        "logging = LoggingConfig(log_interval=2, tensorboard_dir=sys.argv[1], device_peak_tflops=1);"
        "report = Reporter(logging, total_iterations=9);"
        "[report.step(i, metrics(i)) for i in range(1, 6)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert set(scalars(tmp_path, "lm loss")) >= {1, 2, 3, 4}


def test_a_plain_line_comes_once_an_interval_with_means() -> None:
    stream = io.StringIO()
    with reporter(stream, total=5) as report:
        for iteration in range(1, 6):
            report.step(iteration, metrics(iteration))
    first, *lines = stream.getvalue().splitlines()
    assert first == "MFU baseline: 0.5 TFLOP/s per process (given)"
    assert [line.split(" | ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    fields = lines[0].split(" | ")
    tokens_per_second = 2 * TOKENS / 0.3
    mfu = 100 * tokens_per_second * FLOPS_PER_TOKEN / 2 / (PEAK_TFLOPS * 1e12)
    assert fields[1:7] == [
        f"lm loss {(4 / 1 + 4 / 2) / 2:.4f}",
        "lr 5.000e-04",
        "grad norm 1.000",
        "ms/step 150.0",
        f"tokens/s {tokens_per_second / 1e3:.3g}k",
        f"MFU {mfu:.1f}%",
    ]
    assert fields[7].startswith("memory ")
    assert fields[7].endswith(" GiB")
    assert fields[8:] == ["ETA 0:00:00"]


def test_a_line_names_the_batch_size_of_its_last_step_where_it_changes() -> None:
    stream = io.StringIO()
    with reporter(stream, total=4, shows_batch_size=True) as report:
        for iteration in range(1, 5):
            report.step(iteration, replace(metrics(iteration), batch_size=8 * iteration))
    assert re.findall(r"\| (batch size \d+) \|", stream.getvalue()) == ["batch size 16", "batch size 32"]


def test_the_reporters_of_several_phases_show_the_baseline_once() -> None:
    stream = io.StringIO()
    for _ in range(3):
        with reporter(stream, total=2) as report:
            report.step(1, metrics(1))
            report.step(2, metrics(2))
    assert stream.getvalue().count("MFU baseline") == 1 and stream.getvalue().count("step 2/2") == 3


def test_an_mfu_above_100_percent_is_not_printed_without_saying_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    low = PEAK_TFLOPS / 1e6
    with reporter(stream, total=4, device_peak_tflops=low) as report:
        report.step(1, metrics(1))
        report.step(2, metrics(2))
    assert re.search(r"MFU \d{4,}\.\d% \(above the baseline\)", stream.getvalue())

    busy = DevicePeak(low * 1e12, "measured matrix product, fp32", torch.float32)
    monkeypatch.setattr("megatron_ext.training.logging.reporter.device_peak", lambda *_, **__: busy)
    stream = io.StringIO()
    with reporter(stream, total=4, device_peak_tflops=None) as report:
        for iteration in range(1, 5):
            report.step(iteration, metrics(iteration))
    lines = stream.getvalue().splitlines()
    assert (
        len(
            [
                line
                for line in lines
                if "from now on, because the run is faster than the 5e-07 measured" in line
            ]
        )
        == 1
    )
    shown = [float(mfu) for mfu in re.findall(r"MFU ([\d.]+)%", stream.getvalue())]
    assert len(shown) == 2
    assert max(shown) <= 100


def test_a_loss_that_is_no_number_has_no_perplexity() -> None:
    stream = io.StringIO()
    with reporter(stream) as report:
        report.validation(2, {"lm loss": math.nan}, consumed_samples=8)
    assert stream.getvalue().splitlines()[-1] == "validation at step 2 | lm loss nan | ppl nan"


def test_eta_is_the_remaining_steps_at_the_intervals_pace() -> None:
    stream = io.StringIO()
    with reporter(stream, total=100_000) as report:
        report.step(1, metrics(1))
        report.step(2, metrics(2))
    assert stream.getvalue().rstrip().endswith("ETA 4:10:00")  # 99 998 * 0.15 s


def test_skipped_steps_are_counted_and_left_out_of_the_mean(tmp_path: Path) -> None:
    stream = io.StringIO()
    with reporter(stream, tensorboard_dir=str(tmp_path)) as report:
        report.step(1, metrics(1, loss=3.0))
        report.step(2, metrics(2, loss=math.nan, skipped=True))
    line = stream.getvalue().splitlines()[-1]
    assert "lm loss 3.0000" in line
    assert "skipped 1" in line
    assert scalars(tmp_path, "skipped-iterations") == {2: 1.0}
    assert scalars(tmp_path, "nan-iterations") == {2: 1.0}
    assert scalars(tmp_path, "lm loss") == {1: 3.0}


def test_a_layers_loss_is_written_and_not_printed(tmp_path: Path) -> None:
    stream = io.StringIO()
    with reporter(stream, tensorboard_dir=str(tmp_path)) as report:
        for iteration in (1, 2):
            report.step(iteration, metrics(iteration, layer_loss=0.75))
    assert "layer_3" not in stream.getvalue()
    assert scalars(tmp_path, "mlp loss/layer_3") == {1: 0.75, 2: 0.75}


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    with reporter(stream, rank=1, tensorboard_dir=str(tmp_path / "events")) as report:
        report.step(2, metrics(2))
        report.validation(2, {"lm loss": 1.0}, consumed_samples=8)
        report.statistics(2, {"tag": 1.0})
        report.message("text")
    assert stream.getvalue() == ""
    assert not (tmp_path / "events").exists()


def test_without_throughput_nothing_is_measured_or_shown() -> None:
    stream = io.StringIO()
    with reporter(stream, log_throughput=False) as report:
        report.step(1, metrics(1))
        report.step(2, metrics(2))
    assert "MFU" not in stream.getvalue()
    assert "tokens/s" not in stream.getvalue()


def test_a_terminal_gets_a_live_bar_and_notes_above_it() -> None:
    stream = Terminal()
    with reporter(stream) as report:
        for iteration in range(1, 5):
            report.step(iteration, metrics(iteration))
        report.message("saved step 4 [to] a/folder")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = text[text.index("saved step 4 [to] a/folder") :]
    assert "step 4/4" in last
    for field in (
        "lm loss 1.1667",
        "lr 2.500e-04",
        "grad norm 2.000",
        "tokens/s",
        "MFU",
        "memory",
        "ETA 0:00:00",
    ):
        assert field in last
    assert "step 2/4 |" not in text


def test_a_directory_that_cannot_be_made_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    directory = str(tmp_path / "file" / "events")
    with pytest.raises(ValueError, match=f"--tensorboard-dir {directory}: Not a directory"):
        reporter(io.StringIO(), tensorboard_dir=directory)


def test_wandb_that_is_not_installed_is_named_in_one_line_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for rank in (0, 1):
        with pytest.raises(ValueError, match="--wandb-project mine: wandb is not installed"):
            reporter(io.StringIO(), rank=rank, wandb_project="mine")


def test_wandb_gets_the_values_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    options: dict[str, Any] = {
        "wandb_project": "mine",
        "wandb_save_dir": str(tmp_path),
        "wandb_exp_name": "name",
    }
    with reporter(io.StringIO(), **options) as report:
        report.step(1, metrics(1))
        report.step(2, metrics(2))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"lm loss" in content
    assert b"learning-rate" in content
