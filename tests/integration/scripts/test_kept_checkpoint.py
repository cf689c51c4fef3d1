"""A checkpoint that an earlier version wrote is read as it was: the same loss, and the same steps after it.

`kept_checkpoint` holds two steps of a PLE model of two layers, written before the package's files were moved into their
present folders; the expected values are those that the same version gave.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script

ROOT = Path(__file__).parents[3]
KEPT = Path(__file__).parent / "kept_checkpoint"
LOSS = 5.217112112361273
NEXT_STEPS = {3: "5.2144", 4: "5.1206"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    lines = (
        json.dumps({"text": f"line {i} of a small text that is read again and again"}) for i in range(60)
    )
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--input", f"{folder}/text.jsonl", "--output-prefix", f"{folder}/d", "--append-eod"]
    call("tools/preprocess_data.py", *flags, "--tokenizer-type", "ByteLevelTokenizer")
    return f"{folder}/d_text_document"


def call(script: str, *flags: str) -> str:
    done = run_script(script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_earlier_versions_checkpoint_has_the_loss_that_it_had(data: str, tmp_path: Path) -> None:
    call("tools/evaluate.py", "--load", str(KEPT), "--data-path", data, "--output", f"{tmp_path}/e.json")
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))[data]
    assert found["loss"] == pytest.approx(LOSS, rel=1e-6)
    assert found["step"] == 2


def test_an_earlier_versions_run_goes_on_with_the_steps_that_followed_then(data: str, tmp_path: Path) -> None:
    shutil.copytree(KEPT, tmp_path / "run")
    flags = (
        "--lr 1e-2 --train-iters 4 --override-opt-param-scheduler --micro-batch-size 2 --global-batch-size 4"
    )
    more = "--split 90,10,0 --eval-iters 1 --log-interval 1"
    place = ["--load", f"{tmp_path}/run", "--save", f"{tmp_path}/run", "--data-path", data]
    output = call("pretrain_gpt_per_layer.py", *flags.split(), *more.split(), *place)
    losses = {
        int(step): loss for step, loss in re.findall(r"^step +(\d+)/4 \| lm loss ([\d.]+)", output, re.M)
    }
    assert losses == NEXT_STEPS
