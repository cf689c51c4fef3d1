"""Checks that compare several config groups, such as the parallel layout with the model and the batch size.

They run before any process group starts and raise a `ValueError` that names the flag and its value. A check that needs
only one group is in that group's `__post_init__`.
"""

import os

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.rehearsal_config import RehearsalConfig
from megatron_ext.config.groups.training_config import TrainingConfig


def launched_processes() -> int | None:
    """Returns the number of processes that `torchrun` has set in the environment; None without `torchrun`.

    Raises:
        ValueError: WORLD_SIZE is not a number.
    """
    given = os.environ.get("WORLD_SIZE")
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"WORLD_SIZE={given} in the environment: must be a number of processes, at least 1")
    return int(given)


def planned_processes(rehearsal: RehearsalConfig, parallel: ParallelConfig) -> int:
    """Returns the number of processes to plan for: --world-size, else WORLD_SIZE, else enough for one model copy."""
    return rehearsal.world_size or launched_processes() or parallel.model_parallel_size


def validate(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig | None = None,
    optimizer: OptimizerSettings | None = None,
    data: DataConfig | None = None,
    *,
    world_size: int | None = None,
) -> None:
    """Raises `ValueError` for the first contradiction between the config groups.

    Tools that do not train omit `training`, `optimizer` and `data`; the checks that need these groups are then skipped.

    Args:
        model: configuration of the base model.
        parallel: the parallel layout.
        training: batch sizes and length of the training run.
        optimizer: schedules of learning rate and weight decay.
        data: how the samples are built; only its attention-mask and position resets are checked.
        world_size: number of processes; the default is the environment variable WORLD_SIZE set by `torchrun`, or 1.
    """
    if world_size is None:
        world_size = launched_processes() or 1
    data_parallel_size = parallel.data_parallel_size(world_size)
    _check_tensor_parallel(model, parallel)
    _check_pipeline(model, parallel)
    _check_sequence(model, parallel)
    _check_context(model, parallel)
    if data is not None:
        _check_resets(model, data)
    if training is not None:
        if parallel.grad_reduce_in_bf16 and not training.bf16:
            raise ValueError("--grad-reduce-in-bf16: has no effect; it requires --bf16")
        if model.fp8_format is not None:
            _check_fp8(model, parallel, training)
        if (
            parallel.cross_entropy_loss_fusion
            and parallel.tensor_model_parallel_size > 1
            and parallel.cross_entropy_fusion_impl == "native"
            and not training.bf16
        ):
            # mcore's kernel rounds the gradient of the logits to bf16, whatever the precision of the logits.
            raise ValueError(
                "--cross-entropy-loss-fusion: requires --bf16, or --cross-entropy-fusion-impl te"
            )
        _check_batch(parallel, training, data_parallel_size)
        if optimizer is not None:
            _check_schedule(training, optimizer)
            _check_loss_scale(training, optimizer)


def _check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    size = parallel.tensor_model_parallel_size
    divided = (
        ("--num-attention-heads", model.num_attention_heads),
        ("--hidden-size", model.hidden_size),
        *(("--ffn-hidden-size", layer.ffn_hidden_size) for layer in model.layers),
    )
    for flag, value in divided:
        if value % size:
            raise ValueError(f"{flag} {value}: must be divisible by --tensor-model-parallel-size {size}")
    for groups in (layer.num_query_groups for layer in model.layers):
        if groups % size and size % groups:
            raise ValueError(
                f"--num-query-groups {groups}: must be a multiple or a divisor of --tensor-model-parallel-size {size}"
            )
        if groups % size and model.qk_projection_norm:
            raise ValueError(
                f"--num-query-groups {groups}: must be a multiple of --tensor-model-parallel-size {size} with "
                "--qk-projection-norm"
            )


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    layers = min(parallel.stage_sizes(model.num_layers))
    virtual_layers = parallel.num_layers_per_virtual_pipeline_stage
    if virtual_layers is not None and layers % virtual_layers:
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {virtual_layers}: "
            f"must divide {layers}, the number of layers in a pipeline stage"
        )
    chunk = virtual_layers if virtual_layers is not None else layers
    recomputed = parallel.recompute_num_layers
    if recomputed is not None and recomputed > chunk:
        raise ValueError(
            f"--recompute-num-layers {recomputed}: must be at most {chunk}, the number of layers in a pipeline stage"
        )


def _check_sequence(model: ModelConfig, parallel: ParallelConfig) -> None:
    tensor, length = parallel.tensor_model_parallel_size, model.seq_length
    if "mlp" in parallel.recompute_modules and model.has_mlp_bias:
        # With a bias, mcore's recomputed MLP calls itself in an infinite recursion.
        raise ValueError("--recompute-modules mlp: requires --disable-bias-linear and no --add-mlp-bias")
    if parallel.sequence_parallel and length % tensor:
        raise ValueError(
            f"--seq-length {length}: with --sequence-parallel it must be divisible by "
            f"--tensor-model-parallel-size {tensor}"
        )


def _check_context(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Checks that each sequence can be divided among the context-parallel processes."""
    size, length = parallel.context_parallel_size, model.seq_length
    if size == 1:
        return
    if model.attention_backend == "local":
        raise ValueError(
            f"--context-parallel-size {size}: requires --attention-backend sdpa or te (got local)"
        )
    if length % (2 * size):
        raise ValueError(
            f"--seq-length {length}: with --context-parallel-size {size} it must be divisible by {2 * size}"
        )
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length // size % tensor:
        raise ValueError(
            f"--seq-length {length}: with --sequence-parallel and --context-parallel-size {size} it "
            f"must be divisible by {size * tensor}, the product of --context-parallel-size and "
            f"--tensor-model-parallel-size {tensor}"
        )


def _check_fp8(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Rejects matrices whose sizes Transformer Engine cannot multiply in FP8."""
    flag = f"--fp8-format {model.fp8_format}"
    if not training.bf16:
        raise ValueError(f"{flag}: requires --bf16")
    unit, tensor = 32 if model.fp8_recipe == "mxfp8" else 16, parallel.tensor_model_parallel_size
    split = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    rows = training.micro_batch_size * model.seq_length // split
    sizes: tuple[tuple[str, int], ...] = (
        ("--hidden-size", model.hidden_size),
        ("--micro-batch-size x --seq-length", rows),
    )
    for layer in model.layers:
        sizes += (
            ("--ffn-hidden-size", layer.ffn_hidden_size // tensor),
            (
                "--num-attention-heads x --kv-channels",
                model.num_attention_heads * layer.kv_channels // tensor,
            ),
            ("--num-query-groups x --kv-channels", layer.num_query_groups * layer.kv_channels // tensor),
        )
    for name, size in sizes:
        if size % unit:
            raise ValueError(f"{flag}: {name} must be a multiple of {unit} on each rank (got {size})")


def _check_resets(model: ModelConfig, data: DataConfig) -> None:
    """Rejects --reset-attention-mask and --reset-position-ids where the model would ignore them."""
    if data.reset_attention_mask and model.attention_backend == "te":
        # Transformer Engine's causal attention builds its own mask and ignores ours.
        raise ValueError("--reset-attention-mask: requires --attention-backend sdpa or local (got te)")
    positions_count = model.position_embedding_type == "learned_absolute" or data.reset_attention_mask
    if data.reset_position_ids and not positions_count:
        # Rotary attention depends on differences of positions only, and a reset keeps these within a document.
        raise ValueError(
            "--reset-position-ids: has no effect; it requires --reset-attention-mask, or --position-embedding-type "
            f"learned_absolute (got {model.position_embedding_type})"
        )


def _check_batch(parallel: ParallelConfig, training: TrainingConfig, data_parallel_size: int) -> None:
    global_batch_size = training.resolved_global_batch_size(data_parallel_size)
    first = training.batch_sizes(global_batch_size).at(0)
    if training.train_samples is not None and training.train_samples < first:
        raise ValueError(
            f"--train-samples {training.train_samples}: must be at least {first}, the global batch size"
        )
    samples_at_once = training.micro_batch_size * data_parallel_size
    _check_ramp(parallel, training, samples_at_once)
    micro_batches = global_batch_size // samples_at_once
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_layers_per_virtual_pipeline_stage is not None and micro_batches % stages:
        raise ValueError(
            f"--global-batch-size {global_batch_size}: gives {micro_batches} micro-batches per step; "
            f"with virtual pipeline stages this must be a multiple of --pipeline-model-parallel-size {stages}"
        )


def _check_loss_scale(training: TrainingConfig, optimizer: OptimizerSettings) -> None:
    """Rejects settings of the loss scale that would have no effect."""
    names = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    fields = OptimizerSettings.__dataclass_fields__
    for name in ("loss_scale", *names):
        value = getattr(optimizer, name)
        if value == fields[name].default:
            continue
        if not training.fp16:
            raise ValueError(f"{flag_name(name)} {value:g}: has no effect; it requires --fp16")
        if optimizer.loss_scale is not None and name != "loss_scale":
            raise ValueError(
                f"{flag_name(name)} {value:g}: has no effect with --loss-scale "
                f"{optimizer.loss_scale:g}, because the loss scale is then constant; omit one of the two flags"
            )


def _check_ramp(parallel: ParallelConfig, training: TrainingConfig, samples_at_once: int) -> None:
    """Checks that every size of a growing batch can be divided into micro-batches, and these among pipeline
    stages.
    """
    unit, words = samples_at_once, "--micro-batch-size x data-parallel size"
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        unit *= parallel.pipeline_model_parallel_size
        words += " x --pipeline-model-parallel-size, because of virtual pipeline stages"
    ramp = dict(zip(("START", "INCREMENT"), training.rampup_batch_size or (), strict=False))
    schedule = {f"size {size}": size for _, size in training.batch_sizes(0).steps}
    for what, size in {**ramp, **schedule}.items():
        if size % unit:
            name = "rampup_batch_size" if ramp else "step_batch_size_schedule"
            given = f"{flag_name(name)} {' '.join(map(str, getattr(training, name)))}"
            raise ValueError(f"{given}: {what} must be divisible by {unit} ({words})")


def _check_schedule(training: TrainingConfig, optimizer: OptimizerSettings) -> None:
    """Checks that the schedule has the unit of the run length (steps or samples), and that warm-up and decay fit into
    the schedule.
    """
    counts_samples = training.train_samples is not None
    unit, other = ("samples", "iters") if counts_samples else ("iters", "samples")
    for kind in ("decay", "warmup", "wsd_decay"):
        value = getattr(optimizer, f"lr_{kind}_{other}")
        if value:
            flag = flag_name(f"lr_{kind}")
            raise ValueError(
                f"{flag}-{other} {value}: the run's length is given in {unit}; use {flag}-{unit} instead"
            )
    length = training.train_samples if counts_samples else training.train_iters
    decay = getattr(optimizer, f"lr_decay_{unit}") or length
    assert decay is not None, "a resolved configuration has a length"
    warmup = getattr(optimizer, f"lr_warmup_{unit}")
    if warmup >= decay:
        raise ValueError(
            f"--lr-warmup-{unit} {warmup}: must be less than the length of the schedule, {decay} {unit}; "
            f"pass a smaller value, for example --lr-warmup-{unit} {decay // 10}"
        )
    wsd_decay = getattr(optimizer, f"lr_wsd_decay_{unit}")
    if wsd_decay is not None and wsd_decay > decay:
        raise ValueError(
            f"--lr-wsd-decay-{unit} {wsd_decay}: must be at most the length of the schedule, {decay} {unit}"
        )
