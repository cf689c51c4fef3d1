"""Batch sizes, length of the training run, evaluation, precision and seed.

The flags for the learning-rate schedule are in `optimizer_config`, the flags for saving in `checkpoint_config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_numbers,
    check_positive,
    flag,
    flag_name,
)
from megatron_ext.config.groups.batch_sizes import BatchSizes, in_samples, read_schedule

Precision = Literal["fp32", "bf16", "fp16"]
"""Precision of weights and activations; in bf16 and fp16 the optimizer keeps fp32 copies of the weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags for batch sizes, length of the training run, evaluation, precision and seed."""

    micro_batch_size: Annotated[int, flag(aliases=("--batch_size",))] = 1
    """Sequences per micro-batch: the number that one model copy processes at a time."""

    global_batch_size: int | None = None
    """Sequences per optimizer step, over all model copies. Default: micro-batch size x number of model copies."""

    gradient_accumulation_steps: int | None = None
    """Micro-batches per optimizer step on each model copy; use instead of --global-batch-size."""

    calculate_per_token_loss: bool = True
    """Use the mean loss over all counted tokens of the global batch for the gradient. With
    --no-calculate-per-token-loss, use the mean over micro-batches of each micro-batch's mean loss, which is
    Megatron-LM's default.
    """

    rampup_batch_size: Annotated[tuple[int, ...] | None, flag(metavar="START INCREMENT SAMPLES")] = None
    """Begin with START sequences per step and add INCREMENT at equal intervals. After SAMPLES sequences the size is
    --global-batch-size.
    """

    step_batch_size_schedule: Annotated[tuple[str, ...] | None, flag(metavar="TOKENS:SIZE ...")] = None
    """Sequences per step, which depend on the number of tokens before the step. For example, 0:16 2.4B:320 starts
    with 16 and uses 320 after 2.4 billion tokens. K, M, B and T stand for 10^3, 10^6, 10^9 and 10^12. Use instead of
    --global-batch-size.
    """

    train_iters: Annotated[int | None, flag(aliases=("--max_steps",))] = None
    """Length of the run in optimizer steps."""

    train_samples: int | None = None
    """Length of the run in sequences; use instead of --train-iters."""

    num_epochs: float | None = None
    """Length of the run in passes over the training data; use instead of --train-iters."""

    eval_interval: int = 1000
    """Optimizer steps between two evaluations on the validation set."""

    eval_iters: int = 100
    """Number of global batches in each evaluation; 0 turns evaluation off."""

    exit_interval: int | None = None
    """Save and exit at the first step that is a multiple of this number."""

    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""

    seed: int = 1234
    """Random seed for the initial weights, dropout and the data order."""

    bf16: Annotated[bool, flag(aliases=("--mixed_precision",))] = False
    """Compute in bfloat16, with fp32 copies of the weights for the optimizer. Default: everything is fp32."""

    fp16: bool = False
    """Compute in fp16 with a scaled loss (--loss-scale), and with fp32 copies of the weights for the optimizer."""

    max_consecutive_nan_steps: int = 3
    """End the run after this many consecutive steps whose loss or gradient is not finite; each such step is skipped.
    With --fp16, overflows that only lower the loss scale do not count.
    """

    manual_gc: bool = False
    """Collect Python's garbage only every --manual-gc-interval steps, in the same step on every rank."""

    manual_gc_interval: int = 0
    """With --manual-gc: steps between two collections; 0 never collects during training."""

    empty_unused_memory_level: int = 0
    """In every step, release cached but unused GPU memory before the update (1), or before and after it (2); 0 keeps
    the memory cached. Releasing memory is slow and helps only if memory is fragmented.
    """

    skip_train: bool = False
    """Evaluate without training, then exit."""

    dry_run: bool = False
    """Print the number of parameters, the memory and the FLOPs per step, and exit without building the model."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "micro_batch_size", "global_batch_size", "gradient_accumulation_steps")
        check_at_least(self, 1, "train_samples", "eval_interval", "exit_interval")
        check_at_least(self, 1, "max_consecutive_nan_steps")
        # Some scripts accept 0 steps, to prepare a model without training it; all others call `check_has_steps`.
        check_at_least(self, 0, "train_iters", "eval_iters", "seed", "manual_gc_interval")
        check_at_least(self, 0, "empty_unused_memory_level")
        check_at_most(self, 2, "empty_unused_memory_level")
        if self.manual_gc_interval and not self.manual_gc:
            raise ValueError(f"--manual-gc-interval {self.manual_gc_interval}: requires --manual-gc")
        check_at_most(self, 2**32 - 1, "seed")  # numpy accepts no larger seed
        check_positive(self, "exit_duration_in_mins", "num_epochs")
        lengths = (self.train_iters, self.train_samples, self.num_epochs)
        given = [str(length) for length in lengths if length is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise ValueError(
                f"--train-iters, --train-samples, --num-epochs: exactly one is required (got {got})"
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps is not None:
            raise ValueError(
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps}: "
                f"cannot be given together with --global-batch-size {self.global_batch_size}"
            )

        if self.bf16 and self.fp16:
            raise ValueError("--fp16: cannot be given together with --bf16")
        self._check_rampup()
        if self.step_batch_size_schedule is not None:
            self._check_schedule()

    def _check_schedule(self) -> None:
        assert self.step_batch_size_schedule is not None
        given = f"--step-batch-size-schedule {' '.join(self.step_batch_size_schedule)}"
        last = read_schedule(self.step_batch_size_schedule)[-1][1]
        if self.global_batch_size not in (None, last):
            raise ValueError(
                f"{given}: --global-batch-size {self.global_batch_size} must equal the schedule's last size, {last}"
            )
        for name in ("rampup_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) is not None:
                raise ValueError(f"{given}: cannot be given together with {flag_name(name)}")

    def _check_rampup(self) -> None:
        ramp, final = self.rampup_batch_size, self.global_batch_size
        if ramp is None:
            return
        given = f"--rampup-batch-size {' '.join(map(str, ramp))}"
        if len(ramp) != 3 or min(ramp) < 1:
            raise ValueError(f"{given}: must be three numbers of at least 1: START INCREMENT SAMPLES")
        if final is None:
            raise ValueError(f"{given}: requires --global-batch-size, the size after the ramp")
        start, increment, _ = ramp
        if start >= final or (final - start) % increment:
            raise ValueError(
                f"{given}: --global-batch-size {final} must be greater than {start} (START) and differ from it by a "
                f"multiple of {increment} (INCREMENT)"
            )

    @property
    def precision(self) -> Precision:
        """Precision of weights and activations."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def check_has_steps(self) -> None:
        """Checks that the run has at least one step.

        Raises:
            ValueError: --train-iters is 0.
        """
        check_at_least(self, 1, "train_iters")

    @classmethod
    def missing(cls, given: Mapping[str, Any]) -> list[str]:
        """Returns the required flags that were not given; see `flag_table.missing_flags`."""
        lengths = {"train_iters", "train_samples", "num_epochs"}
        return [] if given.keys() & lengths else ["--train-iters (or --train-samples, --num-epochs)"]

    def resolved_global_batch_size(self, data_parallel_size: int) -> int:
        """Returns the number of sequences per optimizer step; without --global-batch-size, computed from other flags.

        Raises:
            ValueError: the global batch is not a multiple of micro-batch size x data-parallel size.
        """
        samples_at_once = self.micro_batch_size * data_parallel_size
        if self.final_batch_size is None:
            return samples_at_once * (self.gradient_accumulation_steps or 1)
        if self.final_batch_size % samples_at_once:
            raise ValueError(
                f"--global-batch-size {self.final_batch_size}: must be divisible by --micro-batch-size "
                f"{self.micro_batch_size} x data-parallel size {data_parallel_size}"
            )
        return self.final_batch_size

    @property
    def final_batch_size(self) -> int | None:
        """Number of sequences per step at the end of the run; None if no flag sets it directly."""
        if self.step_batch_size_schedule is not None:
            return read_schedule(self.step_batch_size_schedule)[-1][1]
        return self.global_batch_size

    @property
    def has_constant_batch_size(self) -> bool:
        """True if all steps have the same number of sequences."""
        return self.rampup_batch_size is None and self.step_batch_size_schedule is None

    def batch_sizes(self, global_batch_size: int) -> BatchSizes:
        """Returns the batch sizes of the steps.

        Args:
            global_batch_size: the result of `resolved_global_batch_size`.
        """
        steps = read_schedule(self.step_batch_size_schedule) if self.step_batch_size_schedule else ()
        return BatchSizes(global_batch_size, self.rampup_batch_size, steps)

    def in_samples(self, seq_length: int) -> "TrainingConfig":
        """Returns a copy with the thresholds of --step-batch-size-schedule in samples of `seq_length` tokens."""
        if self.step_batch_size_schedule is None:
            return self
        return replace(self, step_batch_size_schedule=in_samples(self.step_batch_size_schedule, seq_length))

    def resolved_train_iters(self, global_batch_size: int) -> int:
        """Returns the number of optimizer steps in the whole run; as in Megatron, a last partial batch is dropped.

        If the length was given in epochs, call `with_epochs` first.
        """
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_samples is not None
        return self.batch_sizes(global_batch_size).steps_in(self.train_samples)

    def resolved_train_samples(self, global_batch_size: int) -> int:
        """Returns the number of sequences in the optimizer steps of the whole run."""
        return self.batch_sizes(global_batch_size).samples_in(self.resolved_train_iters(global_batch_size))

    def with_epochs(self, epoch_samples: int, data_parallel_size: int) -> "TrainingConfig":
        """Returns a copy in which `num_epochs` is converted to `train_iters` (at least one step).

        Args:
            epoch_samples: number of sequences in the training data.
            data_parallel_size: number of model copies.
        """
        assert self.num_epochs is not None
        samples = int(self.num_epochs * epoch_samples)
        sizes = self.batch_sizes(self.resolved_global_batch_size(data_parallel_size))
        steps = max(1, sizes.steps_in(samples))
        return replace(self, train_iters=steps, num_epochs=None)
