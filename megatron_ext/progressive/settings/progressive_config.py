"""Flags of progressive training; names and defaults follow docs/design/progressive_growth.md.

A model grows stack by stack: each stack is a group of layers, trained on top of the trunk (the stacks before it). Every
field is a flag of `pretrain_progressive.py` and a key of the section `progressive` of a YAML file; the flags of LoRA
come from `lora_config`. More about the values is in the modules that use them: `rack` (stacks), `trunk_strategy`,
`grown_weights` (initial weights), `phases` (schedule), `time_steps` and `masking` (time and masks), `activation_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_choices,
    check_fraction,
    check_positive,
    flag_name,
)
from megatron_ext.lora.lora_config import LoRAConfig

T = TypeVar("T")

GrowthInit = Literal["random", "copy", "interleave", "zero"]
TrunkStrategy = Literal["frozen", "qlora", "trained"]

MODES = ("append", "prepend")
PRECISIONS = ("full", "half", "bfloat16", "nvfp4", "qlora")


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(LoRAConfig):
    """Flags for growing and training a model stack by stack, on a trunk that is frozen or trains LoRA adapters."""

    enabled: bool = True
    """Grow stack by stack. If disabled, all stacks are created at once and trained end to end, for comparison."""

    target_stacks: int | None = None
    """Number of stacks of the complete model. Default: --max-stacks."""

    max_stacks: int = 12
    """Largest allowed number of stacks; the default of --num-time-steps depends on it."""

    n_blocks: tuple[int, ...] = (4,)
    """Number of transformer layers per stack: one number for all stacks, or one per stack in the order of creation."""

    building_mode: tuple[str, ...] = ("append",)
    """Position of a new stack: append (after the trunk) or prepend (before it); one value for all stacks, or one per
    stack after the first.
    """

    growth_init: GrowthInit = "random"
    """Initial weights of a new stack. random: random values. copy: copies of the neighbouring stack's layers.
    interleave: copies of layers distributed over the trunk. zero: random, but the output projections are zero, so that
    the model computes the same as before.
    """

    trunk_strategy: TrunkStrategy = "frozen"
    """Trained parts of the trunk (the older stacks): nothing (frozen), only adapters (qlora), or everything
    (trained).
    """

    new_stack_precision: tuple[str, ...] = ("full",)
    """Precision of a stack's linear layers: full (fp32, even with --bf16), half, bfloat16, nvfp4 or qlora (NF4); one
    value for all stacks, or one per stack. Stacks of nvfp4 and qlora are trained in the run's precision, and packed
    into four bits when the next stack is added.
    """

    trunk_precision: Literal["full", "half", "bfloat16", "nvfp4", "qlora"] | None = None
    """Precision of a stack once it belongs to the trunk. Default: each stack keeps its own precision."""

    train_embedding: bool = False
    """Train the embedding with every stack, not only with the first; implied by --trunk-strategy trained."""

    stack_steps: tuple[int, ...] | None = None
    """Number of training steps per stack: one number for all stacks, or one per stack. Alternative: --stack-tokens."""

    stack_tokens: tuple[int, ...] | None = None
    """Number of training tokens per stack, rounded down to whole steps: one number for all stacks, or one per stack."""

    joint_steps: int = 0
    """Number of steps of the joint phase: a last phase in which all stacks are trained, and nothing is frozen."""

    joint_lr: float | None = None
    """Peak learning rate of the joint phase. Default: --lr."""

    plateau_patience: int | None = None
    """Number N of steps: end the training of a stack when the mean loss of the last N steps is not lower than the
    mean loss of the N steps before. Default: never.
    """

    plateau_min_delta: float = 0.001
    """With --plateau-patience: required decrease of the mean loss, in nats."""

    training_objective: Literal["mlm", "clm", "diffusion", "custom"] = "mlm"
    """Prediction task. clm: the next token, with causal attention. mlm: masked tokens, with
    bidirectional attention. diffusion: like mlm, but sequences are weighted by 1 / masked fraction. custom: targets
    that the data contains, with bidirectional attention.
    """

    mask_token_id: int | None = None
    """Id of the mask token for mlm and diffusion; it must not occur in the data. Default: the vocabulary's mask token,
    or a new id.
    """

    time_interpretation: Literal["input", "depth"] = "depth"
    """Source of the time step, on which the fraction of masked tokens depends. depth: the stack determines it. input:
    it is sampled for each sequence, and embedded as an input of the model.
    """

    time_embedding_dim: int = 512
    """With --time-interpretation input: width of the time embedding before its projection to the hidden size."""

    time_encoding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    """With --time-interpretation input: encoding of the time step."""

    stack_time_mapping: Literal["linear", "exponential", "custom"] = "linear"
    """With --time-interpretation depth: formula for a stack's time step as a function of the stack's index."""

    custom_time_mapping: str | None = None
    """With --stack-time-mapping custom: dotted name of a function (stack_idx, max_stacks, num_time_steps) -> time
    step.
    """

    time_per_stack: int = 100
    """With --time-interpretation depth: number of time steps per stack."""

    num_time_steps: int | None = None
    """Total number of time steps. Default: --time-per-stack times --max-stacks."""

    min_mask_fraction: float = 0.15
    """Fraction of tokens that is masked at the first time step."""

    max_mask_fraction: float = 0.9
    """Fraction of tokens that is masked at the last time step."""

    epoch_samples: int | None = None
    """Number of sequences per epoch. Every epoch has the same sequences, so that the activation cache is used from a
    stack's second epoch on. Default: documents are packed anew in every epoch, and no sequence is repeated.
    """

    cache_activations: bool = True
    """Cache the output of the trunk for every sample, if the trunk is frozen and lies below the new stack."""

    cache_dir: str | None = None
    """Directory of the activation cache. Default: the cache is in memory."""

    cache_max_gb: float = 1.0
    """Size limit of the activation cache per process, in GiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_at_least(self, 1, "target_stacks", "max_stacks", "time_embedding_dim", "time_per_stack")
        check_at_least(self, 1, "num_time_steps", "plateau_patience", "epoch_samples")
        check_at_least(self, 0, "joint_steps", "mask_token_id", "plateau_min_delta", "cache_max_gb")
        check_at_most(self, 2**20, "cache_max_gb")
        check_fraction(self, "min_mask_fraction", "max_mask_fraction", closed=True)
        check_positive(self, "joint_lr")
        self._check_lists()
        self._check_stacks()
        self._check_contradictions()

    @property
    def num_stacks(self) -> int:
        """Number of stacks of the complete model."""
        return self.max_stacks if self.target_stacks is None else self.target_stacks

    @property
    def resolved_num_time_steps(self) -> int:
        """Total number of time steps."""
        return self.num_time_steps or self.time_per_stack * self.max_stacks

    @property
    def masks_tokens(self) -> bool:
        """Whether the objective masks tokens (mlm, diffusion)."""
        return self.training_objective in ("mlm", "diffusion")

    @property
    def bidirectional(self) -> bool:
        """Whether every position attends to all positions, not only to earlier ones."""
        return self.training_objective != "clm"

    @property
    def embeds_time(self) -> bool:
        """Whether the time step is an input of the model."""
        return self.masks_tokens and self.time_interpretation == "input"

    def blocks_of(self, stack_idx: int) -> int:
        """Returns the number of layers of a stack, by its index in the order of creation, from 0."""
        return _of(self.n_blocks, stack_idx)

    def mode_of(self, stack_idx: int) -> str:
        """Returns the position of a new stack, `append` or `prepend`; the stack must not be the first."""
        return _of(self.building_mode, stack_idx - 1)

    def precision_of(self, stack_idx: int) -> str:
        """Returns the precision of a stack, by its index in the order of creation, from 0."""
        return _of(self.new_stack_precision, stack_idx)

    def _check_lists(self) -> None:
        for name, choices in (("building_mode", MODES), ("new_stack_precision", PRECISIONS)):
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"{flag_name(name)} {value}: must be one of {', '.join(choices)}")
        for name in ("n_blocks", "stack_steps", "stack_tokens"):
            for number in getattr(self, name) or ():
                if number < 1:
                    raise ValueError(f"{flag_name(name)} {number}: must be at least 1")

    def _check_stacks(self) -> None:
        stacks = self.num_stacks
        if stacks > self.max_stacks:
            raise ValueError(f"--target-stacks {stacks}: must be at most --max-stacks {self.max_stacks}")
        for name, needed in (
            ("n_blocks", stacks),
            ("building_mode", stacks - 1),
            ("new_stack_precision", stacks),
            ("stack_steps", stacks),
            ("stack_tokens", stacks),
        ):
            values = getattr(self, name)
            if values is not None and len(values) != 1 and len(values) < needed:
                raise ValueError(
                    f"{flag_name(name)} {' '.join(map(str, values))}: --target-stacks {stacks} requires 1 value or "
                    f"{needed} values (got {len(values)})"
                )
        self.check_stacks(stacks)

    def _check_contradictions(self) -> None:
        if self.stack_steps is not None and self.stack_tokens is not None:
            raise ValueError(
                f"--stack-tokens {self.stack_tokens[0]}: cannot be combined with --stack-steps; omit one of them"
            )
        if self.trunk_strategy == "qlora" and not self.qlora_enabled:
            raise ValueError(
                "--trunk-strategy qlora: trains only adapters, but with --no-qlora-enabled there are "
                "no adapters; omit one of the two flags"
            )
        if self.trunk_strategy == "trained" and self.trunk_precision is not None:
            raise ValueError(
                f"--trunk-precision {self.trunk_precision}: requires a frozen trunk (got --trunk-strategy trained)"
            )
        if self.joint_lr is not None and not self.joint_steps:
            raise ValueError(f"--joint-lr {self.joint_lr}: requires --joint-steps of at least 1")
        if self.max_mask_fraction < self.min_mask_fraction:
            raise ValueError(
                f"--max-mask-fraction {self.max_mask_fraction}: must be at least --min-mask-fraction "
                f"{self.min_mask_fraction}"
            )
        if self.stack_time_mapping == "custom" and self.custom_time_mapping is None:
            raise ValueError("--stack-time-mapping custom: requires --custom-time-mapping")
        if self.stack_time_mapping != "custom" and self.custom_time_mapping is not None:
            raise ValueError(
                f"--custom-time-mapping {self.custom_time_mapping}: requires --stack-time-mapping custom "
                f"(got {self.stack_time_mapping})"
            )
        if self.training_objective == "clm" and self.time_interpretation == "input":
            raise ValueError(
                "--time-interpretation input: requires masked tokens, which --training-objective clm does not have"
            )


def _of(values: Sequence[T], place: int) -> T:
    return values[0] if len(values) == 1 else values[place]
