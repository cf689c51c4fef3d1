"""AdamW, gradient clipping, and the schedules of learning rate and weight decay.

The fields have the names of mcore's `OptimizerConfig` and `OptimizerParamScheduler`, which receive their values.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_choices,
    check_fraction,
    check_numbers,
    check_positive,
    flag,
    flag_name,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Flags for learning rate, weight decay, AdamW and gradient clipping."""

    lr: Annotated[float, flag(aliases=("--learning_rate",))]
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    decoupled_lr: float | None = None
    """Peak learning rate of the word embedding and the output layer. Default: --lr."""

    decoupled_min_lr: float | None = None
    """With --decoupled-lr: learning rate of the word embedding and the output layer at the end of the decay. Default:
    --min-lr.
    """

    lr_decay_style: Literal["linear", "cosine", "constant", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after the warm-up. inverse-square-root is 1 / sqrt(steps), scaled to the peak at the end of
    the warm-up. WSD (warm-up, stable, decay) keeps the peak until the final decay.
    """

    lr_decay_iters: int | None = None
    """Optimizer steps over which the learning rate decays. Default: the whole run."""

    lr_decay_samples: int | None = None
    """Sequences over which the learning rate decays; use with --train-samples, instead of --lr-decay-iters."""

    lr_warmup_iters: int = 0
    """Optimizer steps over which the learning rate rises to its peak (warm-up)."""

    lr_warmup_samples: int = 0
    """Sequences over which the learning rate warms up; use with --train-samples, instead of --lr-warmup-iters."""

    lr_warmup_fraction: float | None = None
    """Length of the warm-up as a fraction of the decay length; use instead of --lr-warmup-iters."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With --lr-decay-style WSD: shape of the final decay."""

    lr_wsd_decay_iters: int | None = None
    """With --lr-decay-style WSD: length of the final decay, in optimizer steps."""

    lr_wsd_decay_samples: int | None = None
    """With --lr-decay-style WSD and --train-samples: length of the final decay, in sequences."""

    weight_decay: float = 0.01
    """Coefficient of AdamW's decoupled weight decay."""

    start_weight_decay: float | None = None
    """Weight decay at the start, with --weight-decay-incr-style linear or cosine."""

    end_weight_decay: float | None = None
    """Weight decay at the end, with --weight-decay-incr-style linear or cosine."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change of the weight decay from --start-weight-decay to --end-weight-decay."""

    adam_beta1: float = 0.9
    """Decay rate of Adam's running mean of gradients."""

    adam_beta2: float = 0.999
    """Decay rate of Adam's running mean of squared gradients."""

    adam_eps: float = 1e-8
    """Constant that Adam adds to the denominator of its update."""

    clip_grad: Annotated[float, flag(aliases=("--max_grad_norm",))] = 1.0
    """Scale the gradients down if their global norm exceeds this value; 0 turns clipping off."""

    loss_scale: float | None = None
    """With --fp16: a fixed loss scale. Default: a scale that falls after overflows and rises otherwise."""

    initial_loss_scale: float = 2.0**32
    """With --fp16: loss scale of the first step."""

    min_loss_scale: float = 1.0
    """With --fp16: lower limit of the loss scale."""

    loss_scale_window: int = 1000
    """With --fp16: consecutive steps without an overflow after which the loss scale is doubled."""

    hysteresis: int = 2
    """With --fp16: number of overflows before the loss scale is halved."""

    override_opt_param_scheduler: bool = False
    """With --load: use the learning-rate and weight-decay schedule given by the flags, not the checkpoint's."""

    use_checkpoint_opt_param_scheduler: bool = False
    """With --load: use the checkpoint's learning-rate and weight-decay schedule and ignore the flags."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_positive(self, "lr", "decoupled_lr", "adam_eps", "lr_decay_iters", "lr_decay_samples")
        check_at_least(
            self, 0, "min_lr", "decoupled_min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples"
        )
        check_at_least(self, 0, "weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad")
        check_at_least(self, 1, "lr_wsd_decay_iters", "lr_wsd_decay_samples")
        check_fraction(self, "adam_beta1", "adam_beta2", "lr_warmup_fraction")
        check_positive(self, "loss_scale", "initial_loss_scale", "min_loss_scale")
        check_at_least(self, 1, "loss_scale_window", "hysteresis")
        if self.min_loss_scale > self.initial_loss_scale:
            raise ValueError(
                f"--min-loss-scale {self.min_loss_scale:g}: must be at most --initial-loss-scale "
                f"{self.initial_loss_scale:g}"
            )
        self._check_learning_rate()
        self._check_weight_decay()
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise ValueError(
                "--override-opt-param-scheduler: cannot be given together with --use-checkpoint-opt-param-scheduler"
            )

    def _check_learning_rate(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}")
        if self.lr_warmup_init > self.lr:
            raise ValueError(f"--lr-warmup-init {self.lr_warmup_init}: must be at most --lr {self.lr}")
        self._check_decoupled()
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_samples):
            raise ValueError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction}: cannot be given together with "
                "--lr-warmup-iters or --lr-warmup-samples"
            )
        wants_wsd = self.lr_decay_style == "WSD"
        has_wsd = self.lr_wsd_decay_iters is not None or self.lr_wsd_decay_samples is not None
        if wants_wsd and not has_wsd:
            raise ValueError(
                "--lr-decay-style WSD: requires --lr-wsd-decay-iters (or --lr-wsd-decay-samples)"
            )
        if has_wsd and not wants_wsd:
            name = "lr_wsd_decay_iters" if self.lr_wsd_decay_iters is not None else "lr_wsd_decay_samples"
            raise ValueError(
                f"{flag_name(name)} {getattr(self, name)}: requires --lr-decay-style WSD (got {self.lr_decay_style})"
            )

    def _check_decoupled(self) -> None:
        peak, end = self.decoupled_lr, self.decoupled_min_lr
        if peak is None:
            if end is not None:
                raise ValueError(f"--decoupled-min-lr {end}: requires --decoupled-lr")
            return
        flag, smallest = ("--min-lr", self.min_lr) if end is None else ("--decoupled-min-lr", end)
        for name, value in ((flag, smallest), ("--lr-warmup-init", self.lr_warmup_init)):
            if value > peak:
                raise ValueError(f"{name} {value}: must be at most --decoupled-lr {peak}")

    def _check_weight_decay(self) -> None:
        ends = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style == "constant":
            if ends != (None, None):
                raise ValueError(
                    "--start-weight-decay, --end-weight-decay: require --weight-decay-incr-style linear or cosine"
                )
        elif self.start_weight_decay is None or self.end_weight_decay is None:
            raise ValueError(
                f"--weight-decay-incr-style {self.weight_decay_incr_style}: "
                "requires both --start-weight-decay and --end-weight-decay"
            )
        elif self.end_weight_decay < self.start_weight_decay:
            raise ValueError(
                f"--end-weight-decay {self.end_weight_decay}: must be at least --start-weight-decay "
                f"{self.start_weight_decay}"
            )
