"""A masked objective through the scripts: trained with the cache on disk, killed and resumed, sampled from."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.platform import process_groups
from megatron_ext.reports.events import read_curves
from megatron_ext.testing.run_single import run_single
from tests.integration.progressive.progressive_run_helpers import ROOT, losses_of, train, write_data
from tools.evaluate import counted_tokens

FLAGS = (
    *("--training-objective", "diffusion", "--time-interpretation", "input", "--time-embedding-dim", "8"),
    *("--target-stacks", "2", "--stack-steps", "6", "--epoch-samples", "12", "--eval-iters", "1"),
    *("--untie-embeddings-and-output-weights", "--log-interval", "1"),
)


def _generate(load: str, *flags: str) -> str:
    return _tool("generate", "--load", load, "--prompt", "3 4 5", "--max-new-tokens", "6", *flags)


def _tool(name: str, *flags: str) -> str:
    """What a script of `tools` prints; in this process."""
    process_groups.shutdown = lambda: None
    specification = importlib.util.spec_from_file_location(f"called_{name}", ROOT / "tools" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclass is looked up there
    specification.loader.exec_module(module)
    output, argv = io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *flags]
    try:
        with contextlib.redirect_stdout(output):
            module.main()
    finally:
        sys.argv = argv
    return output.getvalue()


def _runs(folder: str) -> dict[str, Any]:
    data = write_data(Path(folder))
    cache = ("--cache-dir", f"{folder}/cache")
    found: dict[str, Any] = {}
    found["in memory"] = train(data, f"{folder}/memory", *FLAGS)
    found["on disk"] = train(data, f"{folder}/cached", *FLAGS, *cache, "--tensorboard-dir", f"{folder}/tb")
    found["curves"] = {name: values for name, (_, values) in read_curves(f"{folder}/tb").items()}
    found["uncached"] = train(data, f"{folder}/uncached", *FLAGS, "--no-cache-activations")
    found["identity"] = json.loads(Path(f"{folder}/cache/cache.json").read_text())["identity"]
    found["texts"] = [
        _generate(f"{folder}/cached/progressive_rack", *flags)
        for flags in ((), ("--sampler", "diffusion", "--diffusion-steps", "2", "--temperature", "0"))
    ]
    for name, flags in (("autoregressive", ("--sampler", "autoregressive")), ("top-k", ("--top-k", "3"))):
        with pytest.raises(ValueError, match=f"--(sampler )?{name}") as error:
            _generate(f"{folder}/cached/progressive_rack", *flags)
        found[name] = str(error.value)
    held_out = ("--data-path", data, "--unigram-from", data, "--max-tokens", "160")
    rack = f"{folder}/cached/progressive_rack"
    found["line"] = _tool("evaluate", "--load", rack, *held_out, "--output", f"{folder}/evaluation.json")
    (found["evaluation"],) = json.loads(Path(f"{folder}/evaluation.json").read_text()).values()
    with pytest.raises(ValueError, match="--cache-dir") as error:
        train(data, f"{folder}/other", *FLAGS, *cache, "--seed", "7")
    found["another run"] = str(error.value), Path(f"{folder}/other").exists()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_single(_runs, str(tmp_path_factory.mktemp("masked")))


def test_a_cache_on_disk_and_one_in_memory_give_the_same_losses(runs: dict[str, Any]) -> None:
    codes, outputs = zip(*(runs[name] for name in ("in memory", "on disk", "uncached")), strict=True)
    assert codes == (0, 0, 0)
    memory, disk, uncached = map(losses_of, outputs)
    assert len(memory) == 12 and memory == disk
    # Without a cache a sample has other masks in every stack and epoch; the first epoch of the first stack is the same.
    assert uncached[:3] == memory[:3] and uncached[6:] != memory[6:]


def test_hits_and_the_accuracy_on_masked_tokens_are_in_the_log(runs: dict[str, Any]) -> None:
    assert list(runs["curves"]["cache/hit_rate"]) == [0, 0, 0, 1, 1, 1]
    (name,) = (name for name in runs["curves"] if "masked/token_accuracy" in name and "samples" not in name)
    assert all(0 <= value <= 1 for value in runs["curves"][name])
    assert "token accuracy 0." in runs["on disk"][1]


def test_an_evaluation_tells_the_accuracy_on_masked_tokens_beside_the_unigram_guess(
    runs: dict[str, Any],
) -> None:
    found = runs["evaluation"]
    assert {"loss", "masked_token_accuracy", "unigram_accuracy", "unigram_cross_entropy"} <= found.keys()
    assert 0 <= found["unigram_accuracy"] < 0.2 and 0 <= found["masked_token_accuracy"] < 0.5
    assert f"masked token accuracy {found['masked_token_accuracy']:.4f}; unigram accuracy" in runs["line"]
    assert "160 tokens by weight (only masked tokens count);" in runs["line"]
    assert counted_tokens(1500, 6000, "mlm") == "1,500 masked tokens of 6,000"
    assert counted_tokens(6000, 6000, "custom") == counted_tokens(6000, 6000, None) == "6,000 tokens"


def test_the_tool_samples_from_the_complete_rack(runs: dict[str, Any]) -> None:
    for text in runs["texts"]:
        tokens = text.split("\n")[0].split()
        assert tokens[:3] == ["3", "4", "5"] and len(tokens) <= 9
        assert all(0 <= int(token) < 64 for token in tokens)


def test_the_wrong_sampler_is_refused(runs: dict[str, Any]) -> None:
    assert "every token attends to all others" in runs["autoregressive"]
    assert "cannot be used with --sampler diffusion" in runs["top-k"] or "--top-k 3" in runs["top-k"]


def test_another_runs_cache_is_refused_before_anything_is_written(runs: dict[str, Any]) -> None:
    message, wrote = runs["another run"]
    assert "belongs to another run" in message and "seed" in message
    assert not wrote
