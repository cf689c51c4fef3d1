"""The trunk strategies: what trains in which layer, with which adapters, in which precision.

    newest stack    trains, with its own stack adapter
    trunk           frozen    nothing trains, adapters neither
                    qlora     its adapters train, its weights do not
                    trained   everything trains
    joint phase     everything trains

A stack of four bits (qlora, nvfp4) is packed once it is in the trunk; while its weights train they are the run's.
Source: document 004.
"""

from dataclasses import replace
from typing import Literal, cast

from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.linear_precision import Precision
from megatron_ext.lora.parallel_linear import LayerSettings
from megatron_ext.lora.trainable_layers import SettingsByLayer
from megatron_ext.progressive.growth.rack import Rack, Stack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig

Trains = Literal["newest", "all", "none"]
"""What a phase trains: the newest stack with the trunk as its strategy says, everything, or nothing (inference)."""

TREATMENTS = ("trained", "adapters", "frozen", "cached")
"""What a phase does with a stack: all trains, its adapters alone, nothing, nothing and what it gives is kept."""


def settings_by_layer(
    rack: Rack, config: ProgressiveConfig, trains: Trains, frozen: dict[int, str] | None = None
) -> SettingsByLayer:
    """Layer number -> what progressive training does to it.

    Args:
        rack: the stacks of the model.
        config: adapters, trunk strategy and precision.
        trains: what the phase trains.
        frozen: stack index -> `frozen` or `qlora` for stacks that are treated so whatever the strategy.
    """
    return {
        layer: _settings(rack, stack, config, trains, (frozen or {}).get(stack.index))
        for stack, layers in rack.layers()
        for layer in layers
    }


def _settings(
    rack: Rack, stack: Stack, config: ProgressiveConfig, trains: Trains, given: str | None
) -> LayerSettings:
    in_trunk = stack is not rack.newest
    grows_at_once = not config.enabled
    adapters = {} if grows_at_once else config.adapters(stack.index, in_trunk=in_trunk)
    strategy = given
    if strategy is None:
        if trains == "none":
            strategy = "frozen"
        elif trains == "all" or grows_at_once or not in_trunk:
            strategy = "trained"
        else:
            strategy = config.trunk_strategy
    trains_base = strategy == "trained"
    precision = stack.precision
    if in_trunk and not trains_base and config.trunk_precision is not None:
        precision = config.trunk_precision
    return LayerSettings(
        adapters=adapters,
        trained_adapters=frozenset() if strategy == "frozen" else frozenset(adapters),
        trains_base=trains_base,
        precision=None if trains_base and is_packed(precision) else cast(Precision, precision),
    )


def settings_after_training(rack: Rack, config: ProgressiveConfig, trained: Trains) -> SettingsByLayer:
    """The plan of a phase that is over: nothing trains, adapters and precisions are those that it left.

    Args:
        rack: the stacks of the model.
        config: of the run.
        trained: what the phase trained.
    """
    plan = settings_by_layer(rack, config, trained)
    return {
        layer: replace(settings, trains_base=False, trained_adapters=frozenset())
        for layer, settings in plan.items()
    }


def stack_treatments(rack: Rack, plan: SettingsByLayer, cached_layers: int) -> list[str]:
    """What a phase does with every stack, by the stack's index: `TREATMENTS`.

    Args:
        rack: the stacks of the model.
        plan: of its layers.
        cached_layers: so many layers from the embedding on have their output in the activation cache.
    """
    found = {}
    for stack, layers in rack.layers():
        settings = plan[layers.start]
        if settings.trains_base:
            found[stack.index] = "trained"
        elif settings.trained_adapters:
            found[stack.index] = "adapters"
        else:
            found[stack.index] = "cached" if layers.stop <= cached_layers else "frozen"
    return [found[index] for index in sorted(found)]


def frozen_below(rack: Rack, config: ProgressiveConfig, trains: Trains) -> int:
    """Layers below the newest stack that have nothing that trains, embedding included; 0 if something does."""
    if not _has_trunk(rack, config, trains) or why_uncached(rack, config, trains) is not None:
        return 0
    return rack.num_layers - rack.newest.n_blocks


def why_uncached(rack: Rack, config: ProgressiveConfig, trains: Trains) -> str | None:
    """Why what the trunk gives cannot be kept, for the log; None where it can, or where there is no trunk."""
    if not _has_trunk(rack, config, trains):
        return None
    if config.trunk_strategy != "frozen":
        what = "adapters train" if config.trunk_strategy == "qlora" else "weights train"
        return f"the trunk's {what} (--trunk-strategy {config.trunk_strategy})"
    if config.train_embedding:
        return "the embedding trains (--train-embedding)"
    if rack.stacks[-1] is not rack.newest:
        return "the new stack lies before the trunk (--building-mode prepend)"
    return None


def _has_trunk(rack: Rack, config: ProgressiveConfig, trains: Trains) -> bool:
    return trains == "newest" and config.enabled and len(rack.stacks) > 1
