"""The phases of progressive training: the stacks that each phase trains, its number of steps and its learning rate.

Each phase is one training run, with one of these names:

    progressive_stack_{i}      the model has stacks 0 .. i; stack i is trained on its trunk, the older stacks
    progressive_joint          the model has all stacks, and nothing is frozen; lasts --joint-steps
    progressive_end_to_end     the only phase with --no-enabled: trains all stacks, for the sum of the other phases'
                               steps

Every phase has its own learning-rate schedule, beginning with the warm-up. Steps and samples are counted over all
phases.
"""

from dataclasses import dataclass, replace

from megatron_ext.config.cross_checks import validate
from megatron_ext.config.groups.batch_sizes import BatchSizes
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.progressive.growth.rack import Rack, rack_of
from megatron_ext.progressive.growth.trunk_strategy import Trains
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig

JOINT = "progressive_joint"
END_TO_END = "progressive_end_to_end"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of progressive training; each phase is one training run."""

    name: str
    """Name of the phase and of its directory of checkpoints."""

    rack: Rack
    """The stacks of the phase's model."""

    trains: Trains
    """The part of the model that the phase trains: the `newest` stack or `all` stacks."""

    steps: int
    """Number of steps of the phase, unless a plateau ends it earlier."""

    lr: float
    """Peak learning rate."""

    @property
    def title(self) -> str:
        """Title of the phase in messages and reports."""
        if self.name == JOINT:
            return f"joint phase, all {len(self.rack.stacks)} stacks"
        if self.name == END_TO_END:
            return f"end to end, all {len(self.rack.stacks)} stacks"
        stack = self.rack.newest
        return f"stack {stack.index}: {stack.n_blocks} layers over a trunk of {self.rack.num_layers - stack.n_blocks}"


def stack_name(index: int) -> str:
    """Returns the name of the phase that trains a stack, as in docs/design/progressive_growth.md."""
    return f"progressive_stack_{index}"


def list_phases(
    config: ProgressiveConfig,
    training: TrainingConfig,
    optimizer: OptimizerSettings,
    *,
    sizes: BatchSizes,
    sequence_length: int,
    rack: Rack | None = None,
) -> list[Phase]:
    """Returns all phases in order.

    Args:
        config: the configuration of progressive training.
        training: contains the length of each stack's phase if `config` does not.
        optimizer: contains the peak learning rate.
        sizes: sequences per step.
        sequence_length: tokens per sequence.
        rack: all stacks of the complete model; None for the stacks that `config` describes.

    Raises:
        ValueError: --stack-tokens is less than one step.
    """
    steps: list[int] = []
    for index in range(config.num_stacks):
        consumed = sizes.samples_in(sum(steps))
        steps.append(_steps(config, index, training, sizes, consumed, sequence_length))
    whole = rack or rack_of(config, config.num_stacks)
    lr = optimizer.lr
    if not config.enabled:
        total = sum(steps) + config.joint_steps
        return [Phase(name=END_TO_END, rack=whole, trains="all", steps=total, lr=lr)]
    phases = [
        Phase(
            name=stack_name(index),
            rack=whole.first(index + 1),
            trains="newest",
            steps=count,
            lr=lr,
        )
        for index, count in enumerate(steps)
    ]
    if config.joint_steps:
        joint = Phase(
            name=JOINT, rack=whole, trains="all", steps=config.joint_steps, lr=config.joint_lr or lr
        )
        phases.append(joint)
    return phases


def _steps(
    config: ProgressiveConfig,
    index: int,
    training: TrainingConfig,
    sizes: BatchSizes,
    consumed: int,
    length: int,
) -> int:
    """Returns the number of steps of a stack's phase, which begins after `consumed` sequences."""
    if config.stack_tokens is not None:
        tokens = config.stack_tokens[index if len(config.stack_tokens) > 1 else 0]
        size = sizes.at(consumed)
        if tokens < size * length:
            raise ValueError(
                f"--stack-tokens {tokens} is less than one step, which has {size * length} tokens "
                f"({size} sequences of {length})"
            )
        return sizes.steps_in(tokens // length, consumed)
    if config.stack_steps is not None:
        return config.stack_steps[index if len(config.stack_steps) > 1 else 0]
    if training.train_samples is not None:
        return sizes.steps_in(training.train_samples, consumed)
    return training.resolved_train_iters(sizes.final)


def config_of(config: ProgressiveRunConfig, phase: Phase) -> ProgressiveRunConfig:
    """Returns the configuration of a phase's run, with its number of layers, number of steps and learning rate."""
    optimizer = config.optimizer
    return replace(
        config,
        model=replace(config.model, num_layers=phase.rack.num_layers),
        training=replace(config.training, train_iters=phase.steps, train_samples=None, num_epochs=None),
        optimizer=replace(optimizer, lr=phase.lr, min_lr=min(optimizer.min_lr, phase.lr)),
    )


def check_phases(config: ProgressiveRunConfig, phases: list[Phase], world_size: int) -> None:
    """Checks that every phase's model and schedule fit the parallel layout.

    Raises:
        ValueError: a phase does not fit; the message names the phase.
    """
    for phase in phases:
        own = config_of(config, phase)
        try:
            validate(own.model, own.parallel, own.training, own.optimizer, world_size=world_size)
        except ValueError as error:
            raise ValueError(f"{error} (in the phase {phase.name})") from None
