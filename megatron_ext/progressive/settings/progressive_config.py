"""What a user chooses about progressive training: document 004's keys and defaults, and the schedule of stacks.

Every key is a flag of `pretrain_progressive.py` and a key of the section `progressive` of a YAML file; those of LoRA
come from `lora_config`. What a value means is told where it is used: `rack` (stacks), `plan` (trunk strategies),
`growth` (initial values), `phases` (schedule), `time_steps` and `masking` (time and masks), `activation_cache`.
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
    """Growing a model stack by stack over a frozen or LoRA trunk; document 004's keys."""

    enabled: bool = True
    """Grow stack by stack. Without it all stacks are made at once and trained end to end, for comparison."""

    target_stacks: int | None = None
    """Stacks of the complete rack. Without it --max-stacks."""

    max_stacks: int = 12
    """The most stacks that a rack may have; time is laid out over so many."""

    n_blocks: tuple[int, ...] = (4,)
    """Transformer layers of a stack: one number for all, or one for each stack in the order in which they are made."""

    building_mode: tuple[str, ...] = ("append",)
    """Where a new stack goes: append (after the trunk) or prepend (before it); one word for all, or one for each stack
    after the first."""

    growth_init: GrowthInit = "random"
    """A new stack's weights: random, copy (of the neighbouring stack), interleave (of layers evenly taken from the
    whole trunk), zero (random, but output projections zero: the model's function stays as it was)."""

    trunk_strategy: TrunkStrategy = "frozen"
    """What trains in the trunk: nothing (frozen, adapters included), adapters only (qlora), everything (trained)."""

    new_stack_precision: tuple[str, ...] = ("full",)
    """Precision of a stack's linear layers: full (fp32, under --bf16 too), half, bfloat16, nvfp4, qlora (NF4); one word
    for all, or one for each stack. The two of four bits train in the run's precision and are packed when a stack is
    added to them."""

    trunk_precision: Literal["full", "half", "bfloat16", "nvfp4", "qlora"] | None = None
    """Precision of stacks once they belong to the trunk. Without it their own."""

    train_embedding: bool = False
    """Train the embedding with every stack, not with the first one only; --trunk-strategy trained does so too."""

    stack_steps: tuple[int, ...] | None = None
    """Optimizer steps of a stack: one number for all, or one for each stack. This or --stack-tokens."""

    stack_tokens: tuple[int, ...] | None = None
    """The same in tokens, down to whole steps."""

    joint_steps: int = 0
    """Optimizer steps of a last phase in which the complete rack trains, with nothing frozen; no stack follows it."""

    joint_lr: float | None = None
    """Peak learning rate of that phase. Without it --lr."""

    plateau_patience: int | None = None
    """End a stack early when the mean loss over so many steps is not better than over as many before them."""

    plateau_min_delta: float = 0.001
    """By how many nats it must be better."""

    training_objective: Literal["mlm", "clm", "diffusion", "custom"] = "mlm"
    """clm: next token, causal. mlm: masked tokens, bidirectional. diffusion: the same with more masks at later times.
    custom: targets given by the data, bidirectional."""

    mask_token_id: int | None = None
    """Id of the mask token, for mlm and diffusion; no token of the data. Without it one is added to the vocabulary."""

    time_interpretation: Literal["input", "depth"] = "depth"
    """input: t is drawn for every sequence and told to the model by an embedding. depth: t follows from the stack."""

    time_embedding_dim: int = 512
    """input: width of the time embedding before it is projected to the hidden size."""

    time_encoding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    """input: how time is encoded."""

    stack_time_mapping: Literal["linear", "exponential", "custom"] = "linear"
    """depth: time step of a stack."""

    custom_time_mapping: str | None = None
    """depth, custom: dotted name of a function (stack_idx, max_stacks, num_time_steps) -> time step."""

    time_per_stack: int = 100
    """depth: time steps of a stack."""

    num_time_steps: int | None = None
    """Time steps in all. Without it --time-per-stack times --max-stacks."""

    min_mask_fraction: float = 0.15
    """Part of the tokens that is masked at the first time step."""

    max_mask_fraction: float = 0.9
    """Part of the tokens that is masked at the last."""

    epoch_samples: int | None = None
    """Train on so many sequences over and over, the same ones in every epoch: then the activation cache hits from the
    second epoch of a stack on. Without it a repeated document is packed anew, and no sequence comes twice."""

    cache_activations: bool = True
    """Keep what a frozen trunk makes of each sample, where the trunk lies below the new stack and does not move."""

    cache_dir: str | None = None
    """Directory for the cache. Without it the cache is in memory."""

    cache_max_gb: float = 1.0
    """The most that one process's cache may take, in GiB."""

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
        """Stacks of the complete rack."""
        return self.max_stacks if self.target_stacks is None else self.target_stacks

    @property
    def resolved_num_time_steps(self) -> int:
        """Time steps in all, the default applied."""
        return self.num_time_steps or self.time_per_stack * self.max_stacks

    @property
    def masks_tokens(self) -> bool:
        """Tokens are masked: mlm, diffusion."""
        return self.training_objective in ("mlm", "diffusion")

    @property
    def bidirectional(self) -> bool:
        """Every position attends to all others."""
        return self.training_objective != "clm"

    @property
    def embeds_time(self) -> bool:
        """The model is told the time step."""
        return self.masks_tokens and self.time_interpretation == "input"

    def blocks_of(self, stack_idx: int) -> int:
        """Layers of a stack, by the order in which stacks are made, from 0."""
        return _of(self.n_blocks, stack_idx)

    def mode_of(self, stack_idx: int) -> str:
        """Where a stack goes, `append` or `prepend`; for stacks after the first."""
        return _of(self.building_mode, stack_idx - 1)

    def precision_of(self, stack_idx: int) -> str:
        """Precision of a stack, by the order in which stacks are made, from 0."""
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
            raise ValueError(f"--target-stacks {stacks}: more than --max-stacks {self.max_stacks}")
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
                    f"{flag_name(name)} {' '.join(map(str, values))}: has {len(values)} values, --target-stacks "
                    f"{stacks} needs one, or {needed}"
                )
        self.check_stacks(stacks)

    def _check_contradictions(self) -> None:
        if self.stack_steps is not None and self.stack_tokens is not None:
            raise ValueError(
                f"--stack-tokens {self.stack_tokens[0]}: cannot be given together with --stack-steps"
            )
        if self.trunk_strategy == "qlora" and not self.qlora_enabled:
            raise ValueError(
                "--trunk-strategy qlora: trains adapters only, and --no-qlora-enabled makes none"
            )
        if self.trunk_strategy == "trained" and self.trunk_precision is not None:
            raise ValueError(
                f"--trunk-precision {self.trunk_precision}: is for a frozen trunk, --trunk-strategy is trained"
            )
        if self.joint_lr is not None and not self.joint_steps:
            raise ValueError(f"--joint-lr {self.joint_lr}: needs --joint-steps")
        if self.max_mask_fraction < self.min_mask_fraction:
            raise ValueError(
                f"--max-mask-fraction {self.max_mask_fraction}: below --min-mask-fraction {self.min_mask_fraction}"
            )
        if (self.stack_time_mapping == "custom") != (self.custom_time_mapping is not None):
            raise ValueError(
                f"--custom-time-mapping {self.custom_time_mapping}: goes with --stack-time-mapping custom, "
                f"it is {self.stack_time_mapping}"
            )
        if self.training_objective == "clm" and self.time_interpretation == "input":
            raise ValueError("--time-interpretation input: needs masks, --training-objective clm has none")


def _of(values: Sequence[T], place: int) -> T:
    return values[0] if len(values) == 1 else values[place]
