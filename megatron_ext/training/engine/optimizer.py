"""Wraps the model for training, and builds megatron-core's optimizer and schedule for it.

AdamW with decoupled weight decay (arXiv 1711.05101), biases and one-dimensional parameters undecayed. fp32 runs keep
one copy of the weights; bf16 runs keep fp32 main weights and reduce gradients in fp32.
"""

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.gradient_norms import mark_reduced_ranges
from megatron_ext.training.interface.family_interface import Family


def wrap_model(
    chunks: list[GPTModel], parallel: ParallelConfig, *, bf16: bool
) -> list[DistributedDataParallel]:
    """Puts the chunks into bf16 (where asked) and megatron-core's data-parallel wrapper.

    Args:
        chunks: this rank's model chunks; families have frozen what they freeze.
        parallel: tells how gradients are reduced.
        bf16: the precision of parameters and activations.
    """
    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step looks at loss and gradient norm itself, and skips
    )
    modules = [Float16Module(config, chunk) if bf16 else chunk for chunk in chunks]
    wrapped = [
        # Bucketing overlaps reduction with backward; later chunks' backward comes first, with nothing to overlap.
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    mark_reduced_ranges(wrapped)
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if parallel.overlap_grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def unwrap_model(chunks: list[DistributedDataParallel]) -> list[GPTModel]:
    """The models inside the wrappers of `wrap_model`."""
    models = []
    for chunk in chunks:
        module = chunk
        while hasattr(module, "module"):
            module = module.module
        models.append(module)
    return models


def gather_parameters(chunks: list[torch.nn.Module]) -> None:
    """Completes what the last step has left to the next forward pass under `--overlap-param-gather`; collective.

    Until then every rank has the new values of its own part of the parameters alone.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    settings: OptimizerSettings,
    parallel: ParallelConfig,
    chunks: list[DistributedDataParallel],
    families: list[Family],
    *,
    bf16: bool,
) -> MegatronOptimizer:
    """megatron-core's optimizer over the wrapped chunks; families' learning-rate and decay overrides applied."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config)
    for family in families:
        overrides.update(family.parameter_overrides(settings))
    optimizer = get_megatron_optimizer(
        config, chunks, config_overrides=overrides, use_gloo_process_groups=process_groups.use_gloo_twins()
    )
    _use_fused_kernel(optimizer)
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def _use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW updates all parameters in one kernel with `fused`; the engine builds it with a Python loop."""
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False


def build_scheduler(
    settings: OptimizerSettings,
    training: TrainingConfig,
    optimizer: MegatronOptimizer,
    global_batch_size: int,
) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay, counted in samples.

    Raises:
        ValueError: the warm-up is as long as the decay.
    """
    total = training.resolved_train_iters(global_batch_size) * global_batch_size
    decay = _samples(settings.lr_decay_iters, settings.lr_decay_samples, global_batch_size) or total
    warmup = _samples(settings.lr_warmup_iters, settings.lr_warmup_samples, global_batch_size) or 0
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise ValueError(
            f"--lr-warmup-iters: the warm-up ({warmup} samples) must be shorter than the decay ({decay} samples)"
        )
    start = settings.weight_decay if settings.start_weight_decay is None else settings.start_weight_decay
    end = settings.weight_decay if settings.end_weight_decay is None else settings.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=total,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=_samples(
            settings.lr_wsd_decay_iters, settings.lr_wsd_decay_samples, global_batch_size
        ),
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def _samples(iterations: int | None, samples: int | None, global_batch_size: int) -> int | None:
    if samples:
        return samples
    return iterations * global_batch_size if iterations else None
