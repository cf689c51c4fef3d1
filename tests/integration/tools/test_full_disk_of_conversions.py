"""A disk that is full ends an import or export with one line, and nothing half-written stays."""

from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script
from tests.unit.interop.hf_models import KINDS, alone
from tools.convert_checkpoint import main

TOOL = "tools/convert_checkpoint.py"

pytestmark = pytest.mark.parametrize("small_disk", ["100k"], indirect=True)  # the model has 165


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, small_disk: Path, shards: str
) -> None:
    KINDS["Llama"].build().save_pretrained(tmp_path / "hf")
    load, target = str(tmp_path / "checkpoint"), str(small_disk / "model")
    assert alone(main, ["import", "--model-dir", str(tmp_path / "hf"), "--save", load]) == 0
    flags = ("--load", load, "--model-dir", target, "--max-shard-size", shards)
    done = run_script(TOOL, "export", *flags)
    line = f"--model-dir {target}: could not be written (No space left on device); no partial output is left"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    assert not list(small_disk.iterdir())


def test_an_import_to_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    KINDS["Llama"].build().save_pretrained(tmp_path / "hf")
    save = str(small_disk / "checkpoint")
    done = run_script(TOOL, "import", "--model-dir", str(tmp_path / "hf"), "--save", save)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --save {save}: could not be written (") and (
        done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    )
    assert not list(small_disk.iterdir())
