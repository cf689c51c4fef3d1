"""Builds megatron-core's scheduler of learning rate (warm-up, then decay) and weight decay; its unit is samples."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.training_config import TrainingConfig


def build_scheduler(
    settings: OptimizerSettings,
    training: TrainingConfig,
    optimizer: MegatronOptimizer,
    global_batch_size: int,
    first_sample: int = 0,
) -> OptimizerParamScheduler:
    """Builds the schedule of learning rate and weight decay.

    Args:
        settings: rates and lengths; lengths in iterations are converted to samples.
        training: the run's length, used if the settings give no decay length.
        optimizer: the optimizer whose parameter groups are scheduled.
        global_batch_size: samples per step, after the ramp of --rampup-batch-size if there is one.
        first_sample: number of samples consumed before the schedule begins, on which the ramp depends.

    Raises:
        ValueError: the warm-up is not shorter than the decay.
    """
    sizes = training.batch_sizes(global_batch_size)
    total = sizes.samples_in(training.resolved_train_iters(global_batch_size), first_sample)
    decay = settings.lr_decay_samples or sizes.samples_in(settings.lr_decay_iters or 0, first_sample) or total
    warmup = settings.lr_warmup_samples or sizes.samples_in(settings.lr_warmup_iters, first_sample)
    final = settings.lr_wsd_decay_samples
    if settings.lr_wsd_decay_iters is not None:
        final = settings.lr_wsd_decay_iters * global_batch_size  # at the end of the run, after the ramp
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    if warmup >= decay:
        used = ("fraction", settings.lr_warmup_fraction), ("samples", settings.lr_warmup_samples)
        flag = f"--lr-warmup-{next((unit for unit, value in used if value), 'iters')}"
        raise ValueError(
            f"{flag}: the warm-up ({warmup} samples) must be shorter than the decay ({decay} samples); reduce it, "
            "or lengthen the decay (--lr-decay-iters or --lr-decay-samples; the default is the whole run)"
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
        wsd_decay_steps=final,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
