"""Runs with adapters and stored weights: what moves, what stays to the bit, and going on from a checkpoint."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.lora.parallel_linear import SettingsByLayer
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun, read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.progressive.progressive_helpers import DUAL, MODEL, MakeAdapted

PLAN: SettingsByLayer = {
    0: replace(DUAL, precision="qlora"),
    1: replace(DUAL, precision="nvfp4"),
    2: replace(DUAL, precision="half", trained_adapters=frozenset({"progressive"})),
    3: replace(DUAL, precision="bfloat16", trains_base=True),
}
WIDE = replace(MODEL, hidden_size=128, ffn_hidden_size=128)
"""Of which a half is a multiple of the formats' block."""

CASES = {
    "one process": (LAYOUTS["TP1"], 1, False),
    "TP2+SP": (LAYOUTS["TP2+SP"], 2, False),
    "PP2 bf16": (LAYOUTS["PP2"], 2, True),
    "DP2 distributed optimizer bf16": (LAYOUTS["DP2 distributed optimizer"], 2, True),
}


@dataclass
class Outcome:
    """What one rank saw."""

    moved: set[str]
    trained: set[str]
    losses: list[float]
    resumed_losses: list[float]
    differences: list[str]
    """Parameters that the resumed run has otherwise."""

    dtypes: dict[int, tuple[torch.dtype, bool]]
    """Layer -> dtype of the stored weights, and whether they are packed."""


def _train_save_resume(folder: str, parallel: ParallelConfig, bf16: bool) -> Outcome:
    settings = RunSettings(
        parallel=parallel,
        checkpoint=CheckpointConfig(save=folder),
        model=WIDE,
        make_families=MakeAdapted(PLAN),
        precision="bf16" if bf16 else "fp32",
        micro_batch_size=2,
    )
    run = TinyRun(settings)
    before = _values(run)
    run.train(2)
    run.save()
    after = _values(run)
    losses = run.train(1)
    resumed = TinyRun(replace(settings, checkpoint=CheckpointConfig(load=folder)))
    loaded = _values(resumed)
    resumed_losses = resumed.train(1)
    end, resumed_end = _values(run), _values(resumed)
    return Outcome(
        moved={name for name, value in after.items() if not value.equal(before[name])},
        trained={
            name
            for chunk in run.chunks
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        },
        losses=losses,
        resumed_losses=resumed_losses,
        differences=[
            name
            for name in after
            if not (after[name].equal(loaded[name]) and end[name].equal(resumed_end[name]))
        ],
        dtypes={
            number: (linear.weight.dtype, linear.weight_scales is not None)
            for number, _, linear in adapted_linears(run.chunks)
        },
    )


def _values(run: TinyRun) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for chunk in run.chunks
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@functools.cache
def outcome(case: str, folder: Path) -> list[Outcome]:
    """Results of a case on all ranks; its checkpoint is in the folder's subfolder of this name."""
    parallel, world_size, bf16 = CASES[case]
    return run_distributed(_train_save_resume, world_size, str(folder / case), parallel, bf16)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path]:
    return request.param, folder


def test_what_trains_moves_and_what_is_frozen_stays_to_the_bit(case: tuple[str, Path]) -> None:
    for rank in outcome(*case):
        assert rank.moved == rank.trained
        assert any(f"{ADAPTERS}.progressive.A" in name for name in rank.trained)


def test_a_resumed_run_has_the_same_weights_and_losses_to_the_bit(case: tuple[str, Path]) -> None:
    for rank in outcome(*case):
        assert rank.differences == []
        assert rank.losses == rank.resumed_losses


def test_frozen_weights_keep_their_precision_whatever_the_run_has(case: tuple[str, Path]) -> None:
    run_dtype = torch.bfloat16 if CASES[case[0]][2] else torch.float32
    expected = {
        0: (torch.uint8, True),
        1: (torch.uint8, True),
        2: (torch.float16, False),
        3: (run_dtype, False),
    }
    found = {number: kind for rank in outcome(*case) for number, kind in rank.dtypes.items()}
    assert found == expected


def _read(folder: str) -> dict[str, torch.Tensor]:
    initialize(ParallelConfig(), seed=1)
    return read_plain(f"{folder}/iter_0000002")


def test_a_checkpoint_holds_plain_weights_adapters_and_the_moments_of_what_trains(folder: Path) -> None:
    case = "one process"
    outcome(case, folder)
    tensors = run_single(_read, str(folder / case))
    weight = tensors["decoder.layers.0.mlp.linear_fc1.weight"]
    assert weight.dtype == torch.float32 and weight.shape == (256, 128)
    assert weight.reshape(-1, 64).unique(dim=-1).size(-1) > 2
    for block in weight.view(-1, 64):
        assert len(block.unique()) <= 16  # NF4
    moments = {
        name.removeprefix("optimizer.state.exp_avg.")
        for name in tensors
        if name.startswith("optimizer.state.exp_avg.")
    }
    adapters = {name for name in tensors if name.startswith("decoder") and f".{ADAPTERS}." in name}
    assert len(adapters) == 4 * 4 * 2 * 2
    frozen = {name for name in adapters if ".layers.2." in name and f".{ADAPTERS}.stack." in name}
    base = {name for name in tensors if name.startswith("decoder.layers.3.")} - adapters
    others = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    assert moments == (adapters - frozen) | base | others
