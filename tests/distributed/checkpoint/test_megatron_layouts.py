"""Checkpoints that megatron-core wrote on two ranks, in each format of its optimizers, imported in one process.

`kept_megatron` holds checkpoints that other versions of megatron-core wrote with `Run` of `megatron_checkpoints`:

    0.13.1   two data-parallel ranks, the distributed optimizer in the format `fully_sharded_model_space`
    0.19.2   one rank; there is no common.pt, its content is among the tensors
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop.megatron.megatron_buffers import BufferedOptimizer
from megatron_ext.interop.megatron.torch_dist_files import TorchDistFiles
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.distributed.checkpoint.megatron_checkpoints import CASES, STEPS, Case, Run
from tests.distributed.checkpoint.megatron_imports import imported, our_losses

LAYOUTS_AND_FORMATS: dict[str, tuple[str, ParallelConfig, str | None]] = {
    "TP2": ("Llama", LAYOUTS["TP2"], None),
    "TP2, tied": ("GPT-3", LAYOUTS["TP2"], None),
    "PP2, tied": ("GPT-3", LAYOUTS["PP2"], None),
    "DP2": ("Llama", LAYOUTS["DP2"], None),
    "DP2, fully_reshardable": ("Llama", LAYOUTS["DP2 distributed optimizer"], "fully_reshardable"),
    "DP2, dp_reshardable": ("Llama", LAYOUTS["DP2 distributed optimizer"], "dp_reshardable"),
    "DP2, dp_reshardable, bf16": ("bf16", LAYOUTS["DP2 distributed optimizer"], "dp_reshardable"),
    "TP2, dp_reshardable": (
        "Llama",
        replace(LAYOUTS["TP2"], use_distributed_optimizer=True),
        "dp_reshardable",
    ),
    "PP2, tied, dp_reshardable": (
        "GPT-3",
        replace(LAYOUTS["PP2"], use_distributed_optimizer=True),
        "dp_reshardable",
    ),
    "DP2, fully_reshardable, bf16": ("bf16", LAYOUTS["DP2 distributed optimizer"], "fully_reshardable"),
}


def _write(name: str, parallel: ParallelConfig, sharding: str | None, folder: str) -> list[float]:
    run = Run(CASES[name], parallel, sharding)
    run.train(STEPS)
    run.save(Path(folder), STEPS)
    return run.train(2)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[float]]]:
    """Returns the checkpoint of a layout and the losses of the two steps after it; each is written once."""

    @functools.cache
    def write(layout: str) -> tuple[Path, list[float]]:
        folder = tmp_path_factory.mktemp("theirs")
        losses, _ = run_distributed(_write, 2, *LAYOUTS_AND_FORMATS[layout], str(folder))
        return folder, losses

    return write


@pytest.mark.parametrize("layout", LAYOUTS_AND_FORMATS)
def test_a_run_of_two_ranks_continues_in_one_process(
    layout: str, checkpoint_of: Callable[[str], tuple[Path, list[float]]], tmp_path: Path
) -> None:
    name = LAYOUTS_AND_FORMATS[layout][0]
    theirs, losses = checkpoint_of(layout)
    imported(theirs, tmp_path / "ours", with_optimizer=True)
    tolerance = 2e-2 if CASES[name].precision == "bf16" else 1e-6
    assert our_losses(tmp_path / "ours", CASES[name]) == pytest.approx(losses, rel=tolerance)


LOSSES = {
    "0.13.1": [4.605439186096191, 4.635054111480713],
    "0.19.2": [4.641121864318848, 4.599045753479004],
}
"""The losses of the two steps that the writing version did after the save."""


@pytest.mark.parametrize("version", LOSSES)
def test_a_checkpoint_of_another_version_continues(version: str, tmp_path: Path) -> None:
    imported(Path(__file__).with_name("kept_megatron") / version, tmp_path / "ours", with_optimizer=True)
    assert our_losses(tmp_path / "ours", Case()) == pytest.approx(LOSSES[version], rel=1e-6)


def test_buffers_of_another_model_are_refused(
    checkpoint_of: Callable[[str], tuple[Path, list[float]]], tmp_path: Path
) -> None:
    found = imported(checkpoint_of("DP2, dp_reshardable")[0], tmp_path / "ours")
    files, tensors = TorchDistFiles(found.folder), found.state.tensors
    assert BufferedOptimizer(files, tensors, found.state, {"swiglu": True})
    for name in ("decoder.layers.0.input_layernorm.weight", "decoder.layers.3.mlp.linear_fc2.weight"):
        other = {tensor: found.state[tensor] for tensor in found.state}
        other[name] = other[name] + 1e-6
        with pytest.raises(ValueError, match="do not fit the model.*--dist-ckpt-optim-fully-reshardable"):
            BufferedOptimizer(files, tensors, other, {"swiglu": True})
    with pytest.raises(ValueError, match="do not fit the model"):
        BufferedOptimizer(files, tensors, found.state, {"swiglu": True, "tensor_model_parallel_size": 2})
