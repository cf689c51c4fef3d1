"""What a run prints, and what it writes to TensorBoard and W&B.

Flags for statistics that only one model family has are in that family's config group.
"""

from dataclasses import dataclass

from megatron_ext.config.command_line.field_checks import check_at_least, check_positive, flag_name


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Flags for progress lines, TensorBoard and W&B."""

    log_interval: int = 100
    """Optimizer steps between two progress lines."""

    tensorboard_dir: str | None = None
    """Directory for TensorBoard's event files."""

    tensorboard_log_interval: int = 1
    """Optimizer steps between two values written to TensorBoard."""

    wandb_project: str | None = None
    """W&B project to log to. Requires the extra `wandb`."""

    wandb_exp_name: str | None = None
    """Name of the W&B run."""

    wandb_tags: tuple[str, ...] | None = None
    """Tags of the W&B run."""

    wandb_save_dir: str | None = None
    """Directory for W&B's own files."""

    log_params_norm: bool = False
    """Compute and log the L2 norm of all parameters together."""

    log_throughput: bool = True
    """Log tokens per second and model FLOPs utilization (MFU)."""

    log_memory: bool = False
    """Write current and peak memory to TensorBoard; the progress line always shows the peak."""

    log_validation_ppl: bool = True
    """Log the validation perplexity in addition to the loss."""

    device_peak_tflops: float | None = None
    """Peak TFLOP/s of the device, used to compute MFU. Default: from a table of known GPUs, else measured briefly."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "log_interval", "tensorboard_log_interval")
        check_positive(self, "device_peak_tflops")
        for name in ("wandb_exp_name", "wandb_tags", "wandb_save_dir"):
            value = getattr(self, name)
            if value is not None and self.wandb_project is None:
                text = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(f"{flag_name(name)} {text}: requires --wandb-project")
