"""The configuration dataclasses: documented, frozen, and each refusing values that cannot work."""

import ast
import dataclasses
import inspect
from typing import Any

import pytest

from megatron_ext.config.command_line.layer_windows import skip_frequency
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig

MINIMAL: dict[type[Any], dict[str, Any]] = {
    ModelConfig: {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32},
    ParallelConfig: {},
    TrainingConfig: {"train_iters": 10},
    OptimizerSettings: {"lr": 1e-3},
    CheckpointConfig: {},
    LoggingConfig: {},
    DataConfig: {},
    TokenizerConfig: {"tokenizer_type": "ByteLevelTokenizer"},
}


def make(config_type: type[Any], **changes: Any) -> Any:
    return config_type(**{**MINIMAL[config_type], **changes})


def undocumented_fields(config_type: type[Any]) -> list[str]:
    """Names of the fields that no string literal follows in the class's source."""
    body = ast.parse(inspect.getsource(config_type)).body[0]
    assert isinstance(body, ast.ClassDef)
    return [
        ast.unparse(statement.target)
        for statement, after in zip(body.body, [*body.body[1:], None], strict=True)
        if isinstance(statement, ast.AnnAssign)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]


@pytest.mark.parametrize("config_type", MINIMAL)
def test_every_field_is_documented(config_type: type[Any]) -> None:
    assert undocumented_fields(config_type) == []


@pytest.mark.parametrize("config_type", MINIMAL)
def test_a_config_is_frozen_and_keyword_only(config_type: type[Any]) -> None:
    config = make(config_type)
    first = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, first, 1)
    with pytest.raises(TypeError):
        config_type(1)


# (config, changed fields, what the message must hold)
BAD = [
    (ModelConfig, {"num_layers": 0}, ["--num-layers 0"]),
    (ModelConfig, {"num_attention_heads": 5}, ["--num-attention-heads 5", "--hidden-size 64"]),
    (ModelConfig, {"num_query_groups": 3}, ["--num-query-groups 3", "--num-attention-heads 4"]),
    (ModelConfig, {"group_query_attention": True}, ["--group-query-attention", "--num-query-groups"]),
    (ModelConfig, {"max_position_embeddings": 16}, ["--max-position-embeddings 16", "--seq-length 32"]),
    (ModelConfig, {"position_embedding_type": "rotary"}, ["--position-embedding-type rotary", "rope"]),
    (ModelConfig, {"hidden_dropout": 1.0}, ["--hidden-dropout 1.0"]),
    (ModelConfig, {"rotary_percent": 1.5}, ["--rotary-percent 1.5"]),
    (ModelConfig, {"rope_scaling_factor": 0.0}, ["--rope-scaling-factor 0.0"]),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_high_freq_factor": 1.0},
        ["--rope-high-freq-factor 1.0", "--rope-low-freq-factor 1.0"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2.0},
        ["--rotary-seq-len-interpolation-factor 2.0", "--use-rope-scaling"],
    ),
    # derived values
    (
        ModelConfig,
        {"swiglu": True, "hidden_size": 16},
        ["--hidden-size 16", "width is 0", "give --ffn-hidden-size"],
    ),
    (ModelConfig, {"rotary_percent": 1e-3}, ["--rotary-percent 0.001", "rotates 0", "above 0"]),
    # what would have no effect
    (
        ModelConfig,
        {"position_embedding_type": "learned_absolute", "rotary_percent": 0.5},
        ["--rotary-percent 0.5: has no effect", "--position-embedding-type rope (got learned_absolute)"],
    ),
    (
        ModelConfig,
        {"position_embedding_type": "none", "use_rope_scaling": True},
        ["--use-rope-scaling: has no effect", "(got none)"],
    ),
    (
        ModelConfig,
        {"rope_scaling_factor": 4.0},
        ["--rope-scaling-factor 4.0: has no effect", "--use-rope-scaling"],
    ),
    (ModelConfig, {"sliding_window": 31}, ["--seq-length 32", "sliding window of 31"]),
    (ModelConfig, {"sliding_window": 0}, ["--sliding-window 0"]),
    (ModelConfig, {"swiglu": True, "geglu": True}, ["--geglu", "--swiglu"]),
    (ModelConfig, {"altup_streams": 1}, ["--altup-streams 1: must be at least 2"]),
    (ModelConfig, {"altup_coef_clip": 1.0}, ["--altup-coef-clip 1.0: has no effect", "--altup-streams"]),
    (ModelConfig, {"altup_streams": 4, "altup_coef_clip": 0.0}, ["--altup-coef-clip 0.0"]),
    (ModelConfig, {"laurel_rank": 0}, ["--laurel-rank 0"]),
    (ModelConfig, {"mlp_activation_sparsity": "0.5"}, ["0.5: has no effect", "--swiglu or --geglu"]),
    *(
        (
            ModelConfig,
            {"swiglu": True, "mlp_activation_sparsity": value},
            [f"--mlp-activation-sparsity {value}: must be one number"],
        )
        for value in ("1", "-0.5", "[0.5]", "[0.5]*3", "[0.5]*2+[1]*2", "half", "[0.5, nan]", "[0.5")
    ),
    (ModelConfig, {"softmax_scale": 0.0}, ["--softmax-scale 0.0"]),
    (ModelConfig, {"final_logit_softcapping": -1.0}, ["--final-logit-softcapping -1.0"]),
    (ModelConfig, {"embedding_multiplier": 0.0}, ["--embedding-multiplier 0.0"]),
    (
        ModelConfig,
        {"embedding_multiplier": 8.0, "position_embedding_type": "learned_absolute"},
        ["--embedding-multiplier 8.0: cannot be given", "learned_absolute"],
    ),
    (
        ModelConfig,
        {"rotary_base_local": 100.0},
        ["--rotary-base-local 100.0: has no effect", "--window-size"],
    ),
    (
        ModelConfig,
        {"rotary_base_local": 100.0, "window_size": "7,0", "position_embedding_type": "none"},
        ["--rotary-base-local 100.0: has no effect", "(got none)"],
    ),
    (
        ModelConfig,
        {"post_norm": True, "sandwich_norm": True},
        ["--post-norm: cannot be given together with --sandwich-norm"],
    ),
    (
        ModelConfig,
        {"qk_projection_norm": True, "qk_layernorm": True},
        ["--qk-projection-norm: cannot be given together with --qk-layernorm"],
    ),
    (
        ModelConfig,
        {"qk_projection_norm": True, "normalization": "LayerNorm"},
        ["--qk-projection-norm: requires --normalization RMSNorm (got LayerNorm)"],
    ),
    (ModelConfig, {"residual_multiplier": 0.0}, ["--residual-multiplier 0.0"]),
    (ModelConfig, {"logit_divisor": -1.0}, ["--logit-divisor -1.0"]),
    (ModelConfig, {"no_rope_freq": "[1]"}, ["--no-rope-freq [1]", "zeros and ones"]),
    (ModelConfig, {"no_rope_freq": "0"}, ["--no-rope-freq 0"]),
    (
        ModelConfig,
        {"no_rope_freq": "2", "position_embedding_type": "none"},
        ["--no-rope-freq 2: has no effect", "(got none)"],
    ),
    (
        ModelConfig,
        {"rope_scaling_type": "yarn"},
        ["--rope-scaling-type yarn: has no effect", "--use-rope-sc"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "dynamic", "rope_attention_factor": 2.0},
        ["--rope-attention-factor 2.0: has no effect", "--rope-scaling-type (got dynamic)"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "yarn", "attention_backend": "local"},
        ["--rope-scaling-type yarn: requires --attention-backend sdpa (got local)"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "yarn", "rotary_base": 1.0},
        ["--rotary-base 1.0: must be above 1 with --rope-scaling-type yarn"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "dynamic", "window_size": "7,0"},
        ["--rope-scaling-type dynamic: cannot be given together with --window-size 7,0"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "dynamic", "kv_channels": 2},
        ["--rope-scaling-type dynamic: requires more than 2 rotated channels"],
    ),
    (
        ModelConfig,
        {"use_rope_scaling": True, "rope_scaling_type": "longrope", "rope_short_factors": (1.0,)},
        ["--rope-short-factors: must be", "numbers above 0", "(got 1, the smallest 1.0)"],
    ),
    (ModelConfig, {"window_size": "512"}, ["--window-size 512", "511,0"]),
    (ModelConfig, {"window_size": "511,1"}, ["--window-size 511,1", "0 for later ones"]),
    (ModelConfig, {"window_size": "-1,0"}, ["--window-size -1,0"]),
    (ModelConfig, {"window_size": "7,0", "attention_backend": "local"}, ["--window-size 7,0", "sdpa"]),
    (
        ModelConfig,
        {"window_attn_skip_freq": "2"},
        ["--window-attn-skip-freq 2: has no effect", "--window-size"],
    ),
    *[
        (
            ModelConfig,
            {"window_size": "7,0", "window_attn_skip_freq": skip},
            [f"--window-attn-skip-freq {skip}"],
        )
        for skip in (
            "0",
            "x",
            "[1]",
            "[1,2]*9",
            "[1]*1000000000*1000000000",
            "[1]+1",
            "print()",
            "True",
            "-2",
        )
    ],
    (ModelConfig, {"num_layers": 10**12}, ["--num-layers 1000000000000", "at most 100000"]),
    (ModelConfig, {"rotary_base": float("inf")}, ["--rotary-base inf", "finite"]),
    (ModelConfig, {"seq_length": 2**63}, ["--seq-length 9223372036854775808", "64 bits"]),
    (ModelConfig, {"kv_channels": 15}, ["--rotary-percent", "15"]),
    (ModelConfig, {"attention_backend": "te", "transformer_impl": "local"}, ["--attention-backend te"]),
    (ModelConfig, {"fp8_format": "e4m3", "transformer_impl": "local"}, ["--fp8-format e4m3", "(got local)"]),
    (ModelConfig, {"fp8_recipe": "mxfp8"}, ["--fp8-recipe mxfp8: has no effect", "--fp8-format"]),
    (
        ModelConfig,
        {"fp8_format": "e4m3", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 8},
        ["--fp8-amax-history-len 8: has no effect", "--fp8-recipe delayed"],
    ),
    (ModelConfig, {"fp8_format": "e4m3", "fp8_amax_history_len": 0}, ["--fp8-amax-history-len 0"]),
    (ParallelConfig, {"tensor_model_parallel_size": 0}, ["--tensor-model-parallel-size 0"]),
    (
        ParallelConfig,
        {"num_layers_per_virtual_pipeline_stage": 2},
        ["--num-layers-per-virtual-pipeline-stage 2"],
    ),
    (
        ParallelConfig,
        {"overlap_param_gather": True},
        ["--overlap-param-gather", "--use-distributed-optimizer"],
    ),
    (
        ParallelConfig,
        {"overlap_p2p_communication": True, "pipeline_model_parallel_size": 2},
        ["--overlap-p2p-communication: requires --num-layers-per-virtual-pipeline-stage"],
    ),
    (
        ParallelConfig,
        {"cross_entropy_fusion_impl": "te", "tensor_model_parallel_size": 2},
        ["--cross-entropy-fusion-impl te: has no effect; it requires --cross-entropy-loss-fusion"],
    ),
    (
        ParallelConfig,
        {"recompute_granularity": "full"},
        ["--recompute-granularity full", "--recompute-method"],
    ),
    (
        ParallelConfig,
        {"recompute_method": "block"},
        ["--recompute-method block", "--recompute-granularity full"],
    ),
    (ParallelConfig, {"recompute_modules": ("moe",)}, ["--recompute-modules moe", "core_attn"]),
    (
        ParallelConfig,
        {"recompute_modules": ("mlp",)},
        ["--recompute-modules mlp: requires --recompute-granularity selective (got None)"],
    ),
    (ParallelConfig, {"context_parallel_size": 0}, ["--context-parallel-size 0: must be at least 1"]),
    (ParallelConfig, {"distributed_timeout_minutes": 10**9}, ["--distributed-timeout-minutes 1000000000"]),
    (TrainingConfig, {"seed": 2**32}, ["--seed 4294967296", "at most 4294967295"]),
    (TrainingConfig, {"train_iters": None, "num_epochs": float("inf")}, ["--num-epochs inf", "finite"]),
    (TrainingConfig, {"train_iters": None}, ["--train-iters", "--train-samples", "(got none)"]),
    (TrainingConfig, {"train_samples": 7}, ["--train-iters", "--train-samples", "10", "7"]),
    (
        TrainingConfig,
        {"global_batch_size": 8, "gradient_accumulation_steps": 2},
        ["--gradient-accumulation-steps 2"],
    ),
    (
        TrainingConfig,
        {"step_batch_size_schedule": ("0:2", "5x:3")},
        ["0:2 5x:3: 5x:3 must be THRESHOLD:SIZE"],
    ),
    (TrainingConfig, {"step_batch_size_schedule": ("1:2",)}, ["must begin with 0 and rise"]),
    (TrainingConfig, {"step_batch_size_schedule": ("0:2", "1K:4", "1000:6")}, ["must begin with 0 and rise"]),
    (
        TrainingConfig,
        {"step_batch_size_schedule": ("0:2", "9:4"), "global_batch_size": 8},
        [
            "--step-batch-size-schedule 0:2 9:4",
            "--global-batch-size 8 must equal the schedule's last size, 4",
        ],
    ),
    (
        TrainingConfig,
        {"step_batch_size_schedule": ("0:2",), "gradient_accumulation_steps": 2},
        ["--gradient-accumulation-steps"],
    ),
    (TrainingConfig, {"rampup_batch_size": (2, 2)}, ["--rampup-batch-size 2 2", "START INCREMENT SAMPLES"]),
    (TrainingConfig, {"rampup_batch_size": (2, 2, 9)}, ["--rampup-batch-size 2 2 9", "--global-batch-size"]),
    (
        TrainingConfig,
        {"rampup_batch_size": (8, 2, 9), "global_batch_size": 8},
        ["--rampup-batch-size 8 2 9", "--global-batch-size 8", "greater than 8"],
    ),
    (TrainingConfig, {"fp16": True, "bf16": True}, ["--fp16", "--bf16"]),
    (OptimizerSettings, {"min_loss_scale": 2.0**33}, ["--min-loss-scale", "--initial-loss-scale"]),
    (OptimizerSettings, {"decoupled_min_lr": 0.1}, ["--decoupled-min-lr 0.1: requires --decoupled-lr"]),
    (
        OptimizerSettings,
        {"decoupled_lr": 0.1, "decoupled_min_lr": 0.2},
        ["--decoupled-min-lr 0.2: must be at most --decoupled-lr 0.1"],
    ),
    (ModelConfig, {"squared_relu": True, "swiglu": True}, ["--squared-relu", "--swiglu"]),
    (
        ParallelConfig,
        {
            "recompute_activations": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        ["--recompute-activations", "--recompute-granularity full"],
    ),
    (
        ParallelConfig,
        {"grad_reduce_in_bf16": True, "accumulate_allreduce_grads_in_fp32": True},
        ["--grad-reduce-in-bf16", "--accumulate-allreduce-grads-in-fp32"],
    ),
    (TrainingConfig, {"empty_unused_memory_level": 3}, ["--empty-unused-memory-level 3: must be at most 2"]),
    (LoggingConfig, {"profile_ranks": (0,)}, ["--profile-ranks: has no effect; it requires --profile"]),
    (LoggingConfig, {"profile": True, "profile_step_end": 10}, ["--profile-step-end 10", "start 10"]),
    (
        LoggingConfig,
        {"profile": True, "use_pytorch_profiler": True},
        ["--use-pytorch-profiler: requires --tensorboard-dir"],
    ),
    (OptimizerSettings, {"lr": 0.0}, ["--lr 0.0"]),
    (OptimizerSettings, {"lr": float("nan")}, ["--lr nan"]),
    (OptimizerSettings, {"lr": 1e300}, ["--lr 1e+300", "fp32"]),
    (OptimizerSettings, {"min_lr": 1.0}, ["--min-lr 1.0", "--lr 0.001"]),
    (OptimizerSettings, {"lr_decay_style": "WSD"}, ["--lr-decay-style WSD", "--lr-wsd-decay-iters"]),
    (OptimizerSettings, {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, ["--lr-warmup-fraction 0.1"]),
    (OptimizerSettings, {"weight_decay_incr_style": "linear"}, ["--weight-decay-incr-style linear"]),
    (OptimizerSettings, {"adam_beta2": 1.0}, ["--adam-beta2 1.0"]),
    (CheckpointConfig, {"save_interval": 5}, ["--save-interval 5", "--save"]),
    (CheckpointConfig, {"finetune": True}, ["--finetune", "--load"]),
    (CheckpointConfig, {"async_save": True}, ["--async-save", "--save"]),
    (CheckpointConfig, {"save": "s3://bucket/run"}, ["--save s3://bucket/run", "mount"]),
    (LoggingConfig, {"wandb_exp_name": "x"}, ["--wandb-exp-name x", "--wandb-project"]),
    (LoggingConfig, {"log_interval": 0}, ["--log-interval 0"]),
    (DataConfig, {"data_path": ("0.3", "a", "0.7")}, ["--data-path 0.3 a 0.7"]),
    (DataConfig, {"data_path": ("0.3", "a", "b", "c")}, ["--data-path 0.3 a b c", "'b'"]),
    (DataConfig, {"data_path": ("a",), "train_data_path": ("b",)}, ["--data-path", "--train-data-path"]),
    (TokenizerConfig, {"vocab_size": 10**9}, ["--vocab-size 1000000000", "at most 16777216"]),
    (DataConfig, {"num_workers": 10**6}, ["--num-workers 1000000", "at most 1024"]),
    (DataConfig, {"split": "1,2,x"}, ["--split 1,2,x"]),
    (DataConfig, {"split": "1,1,1,1"}, ["--split 1,1,1,1"]),
    (
        TokenizerConfig,
        {"tokenizer_type": "GPT2BPETokenizer"},
        ["--tokenizer-type GPT2BPETokenizer", "--vocab-file"],
    ),
    (
        TokenizerConfig,
        {"tokenizer_type": "NullTokenizer"},
        ["--tokenizer-type NullTokenizer", "--vocab-size"],
    ),
]


@pytest.mark.parametrize(("config_type", "changes", "words"), BAD)
def test_a_bad_value_is_refused_with_the_flag_and_its_value(
    config_type: type[Any], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is checked
        make(config_type, **changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_mlp_width_follows_megatrons_rule() -> None:
    assert make(ModelConfig, hidden_size=1024).resolved_ffn_hidden_size == 4096
    # Llama 7B's hidden size; Megatron's arguments.py gives 10922 // 64 * 64.
    assert make(ModelConfig, hidden_size=4096, swiglu=True).resolved_ffn_hidden_size == 10880
    assert make(ModelConfig, ffn_hidden_size=100, swiglu=True).resolved_ffn_hidden_size == 100


def test_defaults_that_depend_on_other_fields_are_resolved() -> None:
    config = make(ModelConfig)
    assert config.resolved_kv_channels == 16
    assert config.resolved_num_query_groups == 4
    assert config.resolved_max_position_embeddings == 32


def test_the_global_batch_size_follows_from_what_is_given() -> None:
    assert make(TrainingConfig, micro_batch_size=2).resolved_global_batch_size(3) == 6
    accumulated = make(TrainingConfig, micro_batch_size=2, gradient_accumulation_steps=4)
    assert accumulated.resolved_global_batch_size(3) == 24
    assert make(TrainingConfig, global_batch_size=12, micro_batch_size=2).resolved_global_batch_size(3) == 12
    with pytest.raises(ValueError, match="--global-batch-size 7: must be divisible by --micro-batch-size 2"):
        make(TrainingConfig, global_batch_size=7, micro_batch_size=2).resolved_global_batch_size(1)


@pytest.mark.parametrize(
    ("skip", "windows"),
    [
        (None, [8, 8, 8, 8, 8, 8]),
        ("3", [8, 8, None, 8, 8, None]),
        ("1", [None] * 6),
        ("[0, 1, 1, 1, 1, 1]", [None, 8, 8, 8, 8, 8]),
        ("([1]*2+[0])*2", [8, 8, None, 8, 8, None]),
    ],
)
def test_windows_are_those_of_megatron_cores_rule(skip: str | None, windows: list[int | None]) -> None:
    from megatron.core.transformer.utils import is_layer_window_attention

    model = make(ModelConfig, num_layers=6, window_size="7,0", window_attn_skip_freq=skip)
    assert list(model.windows) == windows
    frequency: Any = eval(skip) if skip else None
    theirs = [is_layer_window_attention((7, 0), frequency, number) for number in range(1, 7)]
    assert [window is not None for window in windows] == theirs
    found = skip_frequency(tuple(theirs))
    assert make(ModelConfig, num_layers=6, window_size="7,0", window_attn_skip_freq=found).windows == tuple(
        windows
    )
