"""The trunk strategies, which determine the trained weights and adapters of each layer, and the layer's precision.

The trunk is all stacks except the newest. The trained parts of a phase depend on --trunk-strategy:

    newest stack    its weights and its adapter
    trunk           frozen    nothing, not even adapters
                    qlora     adapters, but not weights
                    trained   everything
    joint phase     everything, in all stacks

The weights of a stack of precision qlora (NF4; not the trunk strategy of this name) or nvfp4 are packed into four bits
while they are not trained, and have the run's precision while they are trained.
Source: docs/design/progressive_growth.md.
"""

from dataclasses import replace
from typing import Literal, cast

from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.linear_precision import Precision
from megatron_ext.lora.parallel_linear import LayerSettings, SettingsByLayer
from megatron_ext.progressive.growth.rack import Rack, Stack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig

Trains = Literal["newest", "all", "none"]
"""The trained part: the newest stack (and the trunk, according to its strategy), everything, or nothing
(inference).
"""

TREATMENTS = ("trained", "adapters", "frozen", "cached")
"""Treatments of a stack in a phase: everything is trained (trained), only adapters are trained (adapters), nothing is
trained (frozen), or nothing is trained and the trunk's output is cached (cached).
"""


def settings_by_layer(
    rack: Rack, config: ProgressiveConfig, trains: Trains, frozen: dict[int, str] | None = None
) -> SettingsByLayer:
    """Returns the adapters, the trained parts and the precision of each layer, by layer number.

    Args:
        rack: the stacks of the model.
        config: contains adapters, trunk strategy and precisions.
        trains: the part of the model that the phase trains.
        frozen: maps the index of a stack to `frozen` or `qlora`; overrides the trunk strategy for these stacks.
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
    """Returns the layer settings for using the model of a finished phase: as in the phase, but nothing is trained.

    Args:
        rack: the stacks of the model.
        config: the configuration of progressive training.
        trained: the part of the model that the phase has trained.
    """
    plan = settings_by_layer(rack, config, trained)
    return {
        layer: replace(settings, trains_base=False, trained_adapters=frozenset())
        for layer, settings in plan.items()
    }


def stack_treatments(rack: Rack, plan: SettingsByLayer, cached_layers: int) -> list[str]:
    """Returns the treatment of each stack in a phase, by index; see `TREATMENTS`.

    Args:
        rack: the stacks of the model.
        plan: the settings of the model's layers, by number.
        cached_layers: number of layers at the start of the model that do not run, because their output is cached.
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


def stack_descriptions(
    rack: Rack, plan: SettingsByLayer, cached_layers: int, run_precision: str
) -> list[str]:
    """Returns a description of each stack's precision and treatment in a phase, by index, such as `nf4, frozen`.

    Args:
        rack: the stacks of the model.
        plan: the settings of the model's layers, by number.
        cached_layers: see `stack_treatments`.
        run_precision: the run's precision, which stacks without a precision of their own have.
    """
    words = {
        "trained": "trained",
        "adapters": "frozen, with trained adapters",
        "frozen": "frozen",
        "cached": "frozen, output cached",
    }
    found = []
    for index, treatment in enumerate(stack_treatments(rack, plan, cached_layers)):
        precision = plan[rack.layers_of(index).start].precision or run_precision
        found.append(f"{'nf4' if precision == 'qlora' else precision}, {words[treatment]}")
    return found


def frozen_below(rack: Rack, config: ProgressiveConfig, trains: Trains) -> int:
    """Returns the number of layers below the newest stack; 0 if any of them, or the embedding, is trained."""
    if not _has_trunk(rack, config, trains) or why_uncached(rack, config, trains) is not None:
        return 0
    return rack.num_layers - rack.newest.n_blocks


def why_uncached(rack: Rack, config: ProgressiveConfig, trains: Trains) -> str | None:
    """Returns the reason why the trunk's output cannot be cached; None if it can be, or if there is no trunk."""
    if not _has_trunk(rack, config, trains):
        return None
    if config.trunk_strategy != "frozen":
        what = "adapters are" if config.trunk_strategy == "qlora" else "weights are"
        return f"the trunk's {what} trained (--trunk-strategy {config.trunk_strategy})"
    if config.train_embedding:
        return "the embedding is trained (--train-embedding)"
    if rack.stacks[-1] is not rack.newest:
        return "the new stack lies before the trunk (--building-mode prepend)"
    return None


def _has_trunk(rack: Rack, config: ProgressiveConfig, trains: Trains) -> bool:
    return trains == "newest" and config.enabled and len(rack.stacks) > 1
