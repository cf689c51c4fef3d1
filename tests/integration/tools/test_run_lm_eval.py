"""`tools/run_lm_eval.py` runs the harness's own command line on a checkpoint."""

import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.run_distributed import context

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "tests/integration/scripts/kept_checkpoint"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a task of two short texts, scored one byte at a time."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.jsonl").write_text('{"text": "a small text"}\n{"text": "line 7"}\n', encoding="utf-8")
    lines = (ROOT / "examples/lm_eval/text.yaml").read_text(encoding="utf-8")
    lines = lines.replace("examples/lm_eval/text.jsonl", str(folder / "texts.jsonl"))
    (folder / "text.yaml").write_text(lines, encoding="utf-8")
    return folder


def _run_both(task: str, folder: str, variables: dict[str, str]) -> "list[subprocess.CompletedProcess[str]]":
    """Runs the tool on one process and on two; all are forks of this one, which has imported the harness."""
    os.environ.update(variables)  # some are read by the imports
    import lm_eval._cli
    import lm_eval.evaluator  # noqa: F401

    import megatron_ext.harness.harness_model  # noqa: F401

    flags = ["--model", "megatron_ext", "--include_path", task, "--tasks", "local_text"]
    done = []
    for processes in (1, 2):
        where = ["--model_args", f"load={KEPT}", "--output_path", f"{folder}/out{processes}"]
        start = get_context("fork")
        done.append(
            run_script("tools/run_lm_eval.py", *flags, *where, processes=processes, timeout=240, start=start)
        )
    return done


def test_two_processes_print_one_table_and_write_the_results_of_one(task: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        both = pool.submit(_run_both, str(task), str(tmp_path), dict(os.environ)).result()
    results = []
    for processes, done in zip((1, 2), both, strict=True):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("|byte_perplexity|") == 1
        (file,) = (tmp_path / f"out{processes}").rglob("*.json")
        results.append(json.loads(file.read_text(encoding="utf-8"))["results"]["local_text"])
    one, two = (result["byte_perplexity,none"] for result in results)
    assert one == pytest.approx(two, rel=1e-6)
    assert 100 < one < 300  # an untrained model of bytes


def test_a_path_without_a_checkpoint_is_named_before_the_harness_is_imported(tmp_path: Path) -> None:
    wrong = str(tmp_path / "none")
    done = run_script(
        "tools/run_lm_eval.py", "--model", "megatron_ext", "--model_args", f"bf16=True,load={wrong}"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: --model_args load={wrong}: no such directory"]
