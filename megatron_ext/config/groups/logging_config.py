"""The values that a run prints, and those that it writes to TensorBoard and W&B.

Flags for the statistics of a single model family are in that family's config group.
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

    log_num_zeros_in_grad: bool = False
    """Compute and log the number of elements of the gradient that are zero."""

    log_throughput: bool = True
    """Log tokens per second and model FLOPs utilization (MFU)."""

    log_memory: bool = False
    """Write current and peak memory to TensorBoard; the progress line always shows the peak."""

    log_validation_ppl: bool = True
    """Log the validation perplexity in addition to the loss."""

    device_peak_tflops: float | None = None
    """Peak TFLOP/s of the device, used to compute MFU. Default: from a table of known GPUs, else measured briefly."""

    profile: bool = False
    """Profile the steps from --profile-step-start up to, but not including, --profile-step-end. The steps are marked
    for NVIDIA's profiler, which must have started the run; with --use-pytorch-profiler, torch's profiler records
    them.
    """

    profile_step_start: int = 10
    """With --profile: first step to profile."""

    profile_step_end: int = 12
    """With --profile: first step that is no longer profiled."""

    profile_ranks: tuple[int, ...] | None = None
    """With --profile: ranks to profile. Default: all."""

    use_pytorch_profiler: bool = False
    """With --profile: record with torch's profiler, which writes each rank's trace to --tensorboard-dir."""

    pytorch_profiler_collect_shapes: bool = False
    """With --use-pytorch-profiler: also record the shapes of the operations' inputs."""

    pytorch_profiler_collect_callstack: bool = False
    """With --use-pytorch-profiler: also record the Python call stack of each operation."""

    def __post_init__(self) -> None:
        self._check_profile()
        check_at_least(self, 1, "log_interval", "tensorboard_log_interval")
        check_positive(self, "device_peak_tflops")
        for name in ("wandb_exp_name", "wandb_tags", "wandb_save_dir"):
            value = getattr(self, name)
            if value is not None and self.wandb_project is None:
                text = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(f"{flag_name(name)} {text}: requires --wandb-project")

    def _check_profile(self) -> None:
        first, end = self.profile_step_start, self.profile_step_end
        check_at_least(self, 1, "profile_step_start")
        if min(self.profile_ranks or (), default=0) < 0:
            raise ValueError(
                f"--profile-ranks {' '.join(map(str, self.profile_ranks or ()))}: must be at least 0"
            )
        if self.profile and end <= first:
            raise ValueError(f"--profile-step-end {end}: must be above --profile-step-start {first}")
        if self.profile and self.use_pytorch_profiler and self.tensorboard_dir is None:
            raise ValueError(
                "--use-pytorch-profiler: requires --tensorboard-dir, the directory for its traces"
            )
        needed = {
            "use_pytorch_profiler": self.profile,
            "profile_ranks": self.profile,
            "pytorch_profiler_collect_shapes": self.profile and self.use_pytorch_profiler,
            "pytorch_profiler_collect_callstack": self.profile and self.use_pytorch_profiler,
        }
        for name, holds in needed.items():
            if getattr(self, name) and not holds:
                flags = "--profile" + (" --use-pytorch-profiler" if "collect" in name else "")
                raise ValueError(f"{flag_name(name)}: has no effect; it requires {flags}")
