"""Checks over several configurations: what cannot run is refused before any process starts to wait for another."""

from typing import Any

import pytest

from megatron_ext.config.cross_checks import launched_processes, validate
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig


def check(world_size: int = 1, **changes: Any) -> None:
    """Validates a small run; each change goes to the config that has the field."""
    values: dict[type[Any], dict[str, Any]] = {
        ModelConfig: {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32},
        ParallelConfig: {},
        TrainingConfig: {"train_iters": 10},
        OptimizerSettings: {"lr": 1e-3},
        DataConfig: {},
    }
    for name, value in changes.items():
        owner = next(config_type for config_type in values if name in config_type.__dataclass_fields__)
        values[owner][name] = value
    configs = (config_type(**kwargs) for config_type, kwargs in values.items())
    validate(*configs, world_size=world_size)


TP, PP, VP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)

FP8 = {"fp8_format": "e4m3", "bf16": True}

BAD: list[tuple[int, dict[str, Any], str]] = [
    (3, {TP: 2}, "world size 3: must be divisible by --tensor-model-parallel-size 2"),
    (3, {TP: 3}, "--num-attention-heads 4: must be divisible by --tensor-model-parallel-size 3"),
    (
        2,
        {TP: 2, "ffn_hidden_size": 101},
        "--ffn-hidden-size 101: must be divisible by --tensor-model-parallel-size 2",
    ),
    (
        4,
        {TP: 4, "num_attention_heads": 12, "kv_channels": 16, "num_query_groups": 3},
        "--num-query-groups 3: ",
    ),
    (
        4,
        {TP: 4, "num_query_groups": 2, "qk_projection_norm": True},
        "--num-query-groups 2: must be a multiple of --tensor-model-parallel-size 4 with --qk-projection-norm",
    ),
    (
        2,
        {TP: 2, "sequence_parallel": True, "seq_length": 33},
        "--seq-length 33: with --sequence-parallel it must",
    ),
    (3, {PP: 3}, "--num-layers 4: must be divisible by --pipeline-model-parallel-size 3"),
    (
        2,
        {PP: 2, VP: 2, "num_layers": 6},
        "--num-layers-per-virtual-pipeline-stage 2: must divide 3, the number of layers",
    ),
    (2, {PP: 2, VP: 1, "global_batch_size": 3}, "--global-batch-size 3: gives 3 micro-batches per step"),
    (
        2,
        {"global_batch_size": 3},
        "--global-batch-size 3: must be divisible by --micro-batch-size 1 x data-parallel size 2",
    ),
    (
        2,
        {"context_parallel_size": 2, "seq_length": 30},
        "--seq-length 30: with --context-parallel-size 2 it must be divisible by 4",
    ),
    (
        8,
        {"context_parallel_size": 2, TP: 4, "sequence_parallel": True, "seq_length": 36},
        "--seq-length 36: with --sequence-parallel and --context-parallel-size 2 it must be divisible by 8",
    ),
    (
        2,
        {"context_parallel_size": 2, "attention_backend": "local"},
        "--context-parallel-size 2: requires --attention-backend sdpa or te (got local)",
    ),
    (3, {"context_parallel_size": 2}, "world size 3: must be divisible by --tensor-model-parallel-size 1 x"),
    (
        1,
        {"reset_position_ids": True},
        "--reset-position-ids: has no effect; it requires --reset-attention-mask, or",
    ),
    (
        1,
        {"reset_attention_mask": True, "attention_backend": "te"},
        "--reset-attention-mask: requires --attention-backend sdpa or local (got te)",
    ),
    (
        2,
        {PP: 2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        "--recompute-num-layers 3: must be at most 2, the number of layers in a pipeline stage",
    ),
    (
        1,
        {"lr_warmup_iters": 10},
        "--lr-warmup-iters 10: must be less than the length of the schedule, 10 iters; "
        "pass a smaller value, for example --lr-warmup-iters 1",
    ),
    (1, {"lr_decay_samples": 10}, "--lr-decay-samples 10: the run's length is given in iters"),
    (
        1,
        {"train_iters": None, "train_samples": 9, "lr_warmup_iters": 2},
        "--lr-warmup-iters 2: the run's length",
    ),
    (
        1,
        {"train_iters": None, "train_samples": 9, "global_batch_size": 10},
        "--train-samples 9: must be at least 10, the global",
    ),
    (1, {"grad_reduce_in_bf16": True}, "--grad-reduce-in-bf16: has no effect; it requires --bf16"),
    (1, {"hysteresis": 3}, "--hysteresis 3: has no effect; it requires --fp16"),
    (
        1,
        {"fp16": True, "loss_scale": 128.0, "loss_scale_window": 9},
        "--loss-scale-window 9: has no effect with --loss-scale 128, because the loss scale is then constant",
    ),
    (
        2,
        {"step_batch_size_schedule": ("0:2", "9samples:3", "19samples:4")},
        "--step-batch-size-schedule 0:2 9samples:3 19samples:4: size 3 must be divisible by 2 (--micro-batch-size x",
    ),
    (
        2,
        {"global_batch_size": 8, "rampup_batch_size": (2, 3, 9)},
        "--rampup-batch-size 2 3 9: INCREMENT must be divisible by 2 (--micro-batch-size x data-parallel size)",
    ),
    (
        2,
        {PP: 2, VP: 1, "global_batch_size": 8, "rampup_batch_size": (5, 1, 9)},
        "--rampup-batch-size 5 1 9: START must be divisible by 2 (--micro-batch-size x data-parallel size x",
    ),
    (
        1,
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11},
        "--lr-wsd-decay-iters 11: must be at most the length of the schedule, 10",
    ),
    (1, {"fp8_format": "hybrid"}, "--fp8-format hybrid: requires --bf16"),
    (
        2,
        {TP: 2, "cross_entropy_loss_fusion": True},
        "--cross-entropy-loss-fusion: requires --bf16, or --cross-entropy-fusion-impl te",
    ),
    (
        1,
        {**FP8, "ffn_hidden_size": 104},
        "--fp8-format e4m3: --ffn-hidden-size must be a multiple of 16 on each rank (got 104)",
    ),
    (
        2,
        {**FP8, TP: 2, "ffn_hidden_size": 80},
        "--ffn-hidden-size must be a multiple of 16 on each rank (got 40)",
    ),
    (
        2,
        {**FP8, TP: 2, "sequence_parallel": True, "seq_length": 16},
        "--micro-batch-size x --seq-length must be a multiple of 16 on each rank (got 8)",
    ),
    (1, {**FP8, "fp8_recipe": "mxfp8", "seq_length": 16}, "must be a multiple of 32 on each rank (got 16)"),
]


@pytest.mark.parametrize(("world_size", "changes", "message"), BAD)
def test_what_cannot_run_is_refused(world_size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is checked
        check(world_size, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (8, {TP: 2, PP: 2, VP: 1, "sequence_parallel": True, "global_batch_size": 8}),
        (4, {TP: 4, "num_query_groups": 2}),  # a group is shared by two processes, as in megatron-core
        (
            1,
            {"sequence_parallel": True, "seq_length": 33},
        ),  # without tensor parallelism there is nothing to split
        (
            2,
            {
                PP: 2,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 2,
            },
        ),
        (1, {"reset_position_ids": True, "reset_attention_mask": True}),
        (2, {**FP8, TP: 2, "sequence_parallel": True}),
        (1, {"reset_position_ids": True, "position_embedding_type": "learned_absolute"}),
        (1, {"train_iters": None, "train_samples": 50, "lr_warmup_samples": 5, "lr_decay_samples": 40}),
    ],
)
def test_what_can_run_passes(world_size: int, changes: dict[str, Any]) -> None:
    check(world_size, **changes)


def test_the_number_of_processes_is_read_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    with pytest.raises(ValueError, match="world size 3"):
        validate(model, ParallelConfig(tensor_model_parallel_size=2))


@pytest.mark.parametrize("given", ["abc", "0", "-2", "1.5"])
def test_a_wrong_number_of_processes_in_the_environment_is_named(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(
        ValueError, match=f"^WORLD_SIZE={given} in the environment: must be a number of processes"
    ):
        launched_processes()


def test_virtual_stages_are_counted_and_a_single_one_is_no_interleaving() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert parallel.virtual_pipeline_size(8) == 2
    assert parallel.virtual_pipeline_size(4) is None
