"""Builds megatron-core's optimizer for the wrapped model.

AdamW with decoupled weight decay (arXiv 1711.05101); biases and one-dimensional parameters have no weight decay. bf16
and fp16 runs keep fp32 main weights.
"""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.utils import get_model_config

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.platform import process_groups
from megatron_ext.platform.run_phases import OPTIMIZER, in_phase
from megatron_ext.training.engine.data_parallel import unwrap_models
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.interface.own_optimizer import OwnOptimizer, own_optimizers


@in_phase(OPTIMIZER)
def build_optimizer(
    settings: OptimizerSettings,
    parallel: ParallelConfig,
    chunks: list[DistributedDataParallel],
    families: list[Family],
    *,
    precision: Precision = "fp32",
) -> MegatronOptimizer:
    """Builds megatron-core's optimizer for the wrapped chunks.

    Args:
        settings: learning rate, weight decay, Adam's constants, clipping.
        parallel: the parallel layout, which specifies whether the distributed optimizer is used.
        chunks: this rank's chunks, wrapped by `wrap_model`.
        families: the run's model families, which supply overrides of learning rate and weight decay for their
            parameters, and optimizers for parameters that the engine does not train.
        precision: precision of the parameters; in fp16 the optimizer scales the loss.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        decoupled_lr=settings.decoupled_lr,
        decoupled_min_lr=settings.decoupled_min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=get_model_config(chunks[0]).params_dtype,
        loss_scale=settings.loss_scale,
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config)
    for family in families:
        overrides.update(family.parameter_overrides(settings))
    optimizer = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=overrides,
        use_gloo_process_groups=process_groups.needs_gloo_twins(parallel),
    )
    _use_fused_kernel(optimizer)
    models = unwrap_models(chunks)
    for family in families:
        optimizer.chained_optimizers += family.own_optimizers(models, settings, optimizer)
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def _use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    # megatron-core builds torch's AdamW with a Python loop over parameters; `fused` updates all of them in one kernel.
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False


@torch.no_grad()
def update_if(condition: torch.Tensor, optimizer: MegatronOptimizer) -> None:
    """Updates the parameters with the gradients that `prepare_grads` has set, or changes nothing.

    Args:
        condition: whether to update: a boolean scalar on the device, equal on every rank.
        optimizer: the optimizer of the parameters.
    """
    for own in own_optimizers(optimizer):
        own.is_applied = condition
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [part.optimizer for part in parts if not isinstance(part, OwnOptimizer)]
    if all(isinstance(each, torch.optim.AdamW) for each in inner if each is not None):
        # The fused kernel reads this flag on the device; if it is set, parameters, moments and step counts do not
        # change.
        for each in inner:
            if each is not None:
                each.found_inf = (~condition).float()
    elif not bool(
        condition
    ):  # Transformer Engine's and Apex's Adam have no such flag, so the host has to read the condition
        return
    optimizer.step_with_ready_grads()
