"""A run that stops and goes on is the run that never stopped: at the same layout to the bit, at another to rounding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.testing.checkpoint_runs import SCHEDULE, TINY_WITH_DROPOUT, RunSettings, TinyRun, read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import CONTEXT_LAYOUTS, LAYOUTS, TINY, WORLD_SIZES

_DISTRIBUTED = ParallelConfig(use_distributed_optimizer=True)
_DISTRIBUTED_PP2 = ParallelConfig(use_distributed_optimizer=True, pipeline_model_parallel_size=2)
_DIVIDED = {name: CONTEXT_LAYOUTS[name] for name in ("CP2", "PP2xCP2", "DP2xCP2 distributed optimizer")}
_LAYOUTS = {
    **LAYOUTS,
    "DP2xPP2 distributed optimizer": _DISTRIBUTED_PP2,
    **{name: parallel for name, (parallel, _) in _DIVIDED.items()},
}
_SIZES = {
    **WORLD_SIZES,
    "DP2xPP2 distributed optimizer": 4,
    **{name: size for name, (_, size) in _DIVIDED.items()},
}
_SINGLE = RunSettings(parallel=ParallelConfig(), checkpoint=CheckpointConfig(), micro_batch_size=2)
_RESUMED: dict[str, tuple[ParallelConfig, int, Precision]] = {
    "TP1": (LAYOUTS["TP1"], 1, "fp32"),
    "TP2": (LAYOUTS["TP2"], 2, "fp32"),
    "PP2": (LAYOUTS["PP2"], 2, "fp32"),
    "PP2 interleaved": (LAYOUTS["PP2 interleaved"], 2, "fp32"),
    "DP2 distributed optimizer": (_DISTRIBUTED, 2, "fp32"),
    "CP2": (*CONTEXT_LAYOUTS["CP2"], "fp32"),
    "TP1 bf16": (LAYOUTS["TP1"], 1, "bf16"),
    "DP2 distributed optimizer bf16": (_DISTRIBUTED, 2, "bf16"),
    "DP2 distributed optimizer fp16": (_DISTRIBUTED, 2, "fp16"),
}


def _state_of(run: TinyRun, rank_file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = rank_file.parent.parent
    return read_plain(str(folder)), torch.load(rank_file, weights_only=True)


def _straight_and_resumed(folder: str, settings: RunSettings) -> dict[str, Any]:
    """Four steps in one go, saving after the second and the fourth; and two steps from the first of these saves."""
    import os

    rng = f"rng/rank_{int(os.environ['RANK']):05d}.pt"
    straight = TinyRun(replace(settings, checkpoint=CheckpointConfig(save=f"{folder}/straight")))
    straight.train(2)
    straight.save()
    losses = straight.train(2)
    expected = _state_of(straight, straight.save() / rng)
    config = CheckpointConfig(load=f"{folder}/straight", ckpt_step=2, save=f"{folder}/resumed")
    resumed = TinyRun(replace(settings, checkpoint=config))
    at_start = resumed.progress.iteration
    resumed_losses = resumed.train(2)
    return {
        "start": at_start,
        "losses": (losses, resumed_losses),
        "states": (expected, _state_of(resumed, resumed.save() / rng)),
        "rates": tuple(run.optimizer.param_groups[0]["lr"] for run in (straight, resumed)),
        "progress": (straight.progress, resumed.progress),
        "scales": (straight.loss_scales[2:], resumed.loss_scales),
    }


def _assert_equal(expected: Any, found: Any) -> None:
    assert type(expected) is type(found)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected:
            _assert_equal(expected[key], found[key])
    else:
        assert expected == found


@pytest.mark.parametrize("layout", _RESUMED)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(layout: str, tmp_path: Path) -> None:
    parallel, world_size, precision = _RESUMED[layout]
    settings = RunSettings(
        parallel=parallel,
        checkpoint=CheckpointConfig(),
        model=TINY_WITH_DROPOUT,
        precision=precision,
        optimizer=replace(SCHEDULE, initial_loss_scale=2.0**12, loss_scale_window=3),
        micro_batch_size=2,
    )
    for result in run_distributed(_straight_and_resumed, world_size, str(tmp_path), settings):
        assert result["start"] == 2
        straight, resumed = result["losses"]
        assert straight == resumed
        (tensors, rng), (resumed_tensors, resumed_rng) = result["states"]
        assert {name.split(".")[0] for name in tensors} >= {"optimizer", "decoder", "embedding"}
        _assert_equal(tensors, resumed_tensors)
        _assert_equal(rng, resumed_rng)
        assert result["rates"][0] == result["rates"][1]
        assert result["progress"][0] == result["progress"][1]
        # The third step ends the window that the checkpoint was in the middle of.
        scales = [2.0**13] * 2 if precision == "fp16" else [None] * 2
        assert result["scales"] == (scales, scales)


def _train_and_save(folder: str, settings: RunSettings, steps: int) -> list[float]:
    run = TinyRun(replace(settings, checkpoint=CheckpointConfig(save=folder)))
    run.train(steps)
    run.save()
    return run.train(2)


def _load_save_and_train(source: str, target: str, settings: RunSettings) -> tuple[list[float], list[str]]:
    run = TinyRun(replace(settings, checkpoint=CheckpointConfig(load=source, save=target)))
    run.save()
    return run.train(2), run.messages


def _whole_tensors(*folders: str) -> list[dict[str, torch.Tensor]]:
    from megatron_ext.platform.process_groups import initialize

    initialize(ParallelConfig(), seed=1)
    return [read_plain(f"{folder}/iter_0000002") for folder in folders]


def test_a_checkpoint_has_the_last_steps_weights_where_their_gathering_overlaps_the_next(
    tmp_path: Path,
) -> None:
    plain = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    for name, parallel in {"plain": plain, "overlapped": replace(plain, overlap_param_gather=True)}.items():
        settings = replace(_SINGLE, parallel=parallel)
        losses = run_distributed(_train_and_save, 2, str(tmp_path / name), settings, 2)
        assert losses[0] == losses[1]
    folders = [str(tmp_path / name) for name in ("plain", "overlapped")]
    _assert_equal(*run_single(_whole_tensors, *folders))


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """A checkpoint of two steps in one process, and the losses of the next two."""
    folder = str(tmp_path_factory.mktemp("single"))
    return folder, run_single(_train_and_save, folder, _SINGLE, 2)


@pytest.mark.parametrize("layout", [name for name in _LAYOUTS if name != "TP1"])
def test_a_single_process_checkpoint_goes_on_at_every_parallel_layout(
    layout: str, single_process: tuple[str, list[float]], tmp_path: Path
) -> None:
    source, losses = single_process
    settings = replace(_SINGLE, parallel=_LAYOUTS[layout])
    target = str(tmp_path)
    for found, notes in run_distributed(_load_save_and_train, _SIZES[layout], source, target, settings):
        # Adam without its moments, or with those of another parameter, is off in the second digit.
        assert found == pytest.approx(losses, rel=1e-5)
        assert any("re-seeded" in note for note in notes)
    written, rewritten = run_single(_whole_tensors, source, target)
    assert len(written) == 3 * sum(not name.startswith("optimizer.") for name in written)
    _assert_equal(written, rewritten)


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        ("PP2 interleaved", False),
        ("DP2 distributed optimizer", False),
        ("DP2 distributed optimizer", True),
        ("TP2", True),
        ("CP2", False),
        ("DP2xCP2 distributed optimizer", False),
    ],
)
def test_a_checkpoint_of_a_layout_goes_on_in_a_single_process(
    layout: str, bf16: bool, tmp_path: Path
) -> None:
    settings = replace(_SINGLE, parallel=_LAYOUTS[layout], precision="bf16" if bf16 else "fp32")
    source, target = f"{tmp_path}/layout", f"{tmp_path}/single"
    losses = run_distributed(_train_and_save, _SIZES[layout], source, settings, 2)[0]
    alone = replace(settings, parallel=ParallelConfig())
    found, _ = run_single(_load_save_and_train, source, target, alone)
    assert found == pytest.approx(losses, rel=1e-2 if bf16 else 1e-5)
    _assert_equal(*run_single(_whole_tensors, source, target))


def _moments_of_parameters(source: str, parallel: ParallelConfig) -> list[str]:
    """Names of parameters whose value or moments are not the slice of the checkpoint's whole tensors."""
    from megatron_ext.models.initialization import CHECKPOINT_METADATA, parameter_shards

    run = TinyRun(RunSettings(parallel=parallel, checkpoint=CheckpointConfig(load=source)))
    whole, wrong, seen = read_plain(f"{source}/iter_0000002"), [], 0
    for chunk in run.chunks:
        for parameter, shard in parameter_shards(
            chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        ):
            if shard.local_shape != tuple(parameter.shape):
                continue  # half of a fused projection; those are covered by training on
            seen += 1
            place = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            state = run.optimizer.optimizer.state[parameter]
            values = {"": parameter.data, "optimizer.state.exp_avg.": state["exp_avg"]}
            values["optimizer.state.exp_avg_sq."] = state["exp_avg_sq"]
            for prefix, value in values.items():
                if not torch.equal(whole[prefix + shard.key][place], value):
                    wrong.append(prefix + shard.key)
            if float(state["step"]) != 2:
                wrong.append(f"step of {shard.key}")
    assert seen > 5
    return wrong


@pytest.mark.parametrize("layout", ["PP2 interleaved", "TP2xPP2"])
def test_every_rank_holds_its_slice_of_parameters_and_moments(
    layout: str, single_process: tuple[str, list[float]]
) -> None:
    for wrong in run_distributed(_moments_of_parameters, _SIZES[layout], single_process[0], LAYOUTS[layout]):
        assert wrong == []


def test_padding_between_the_distributed_optimizers_buckets_is_not_mistaken_for_state(tmp_path: Path) -> None:
    # The shared word embedding has a bucket of its own; three such layers make one before it that is padded.
    model = replace(TINY, num_layers=6, hidden_size=40)
    alone = replace(_SINGLE, model=model)
    layout = replace(alone, parallel=_DISTRIBUTED_PP2)
    first, second, third = (f"{tmp_path}/{name}" for name in ("single", "layout", "again"))
    losses = run_single(_train_and_save, first, alone, 2)
    found, _ = run_distributed(_load_save_and_train, 4, first, second, layout)[0]
    again, _ = run_single(_load_save_and_train, second, third, alone)
    _assert_equal(*run_single(_whole_tensors, first, second))
    assert found == pytest.approx(losses, rel=1e-5)
    assert again == losses
