"""Counts the parameters and FLOPs that progressive training adds to a model, and describes a step's work.

In addition to the adapters, which `lora.adapter_cost` counts:

    time embedding                                 h d (+ T d if learned) parameters; 2 h d FLOPs per sequence

The trunk is the stacks below or above the new stack. Head and final norm are always trained.
"""

from dataclasses import replace

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.lora.adapter_cost import adapted_work, adapter_parameters
from megatron_ext.lora.parallel_linear import SettingsByLayer
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


def progressive_cost(plan: SettingsByLayer, config: ProgressiveConfig, model: ModelConfig) -> ModelCost:
    """Returns the parameters and FLOPs that adapters and time embedding add to the model.

    Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        config: the configuration of progressive training.
        model: configuration of the base model.
    """
    adapters = adapter_parameters(plan, model)
    return ModelCost(
        parameters=adapters + _time_parameters(config, model),
        forward_flops_per_token=2.0 * adapters + _time_flops(config, model),
    )


def progressive_work(
    plan: SettingsByLayer,
    config: ProgressiveConfig,
    model: ModelConfig,
    *,
    trains_embedding: bool,
    cached_layers: int,
) -> StepWork:
    """Describes the parts of the model that a training step runs and trains.

    Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        config: the configuration of progressive training.
        model: configuration of the base model.
        trains_embedding: whether the word embedding and the time embedding are trained.
        cached_layers: number of layers at the start of the model that do not run, because the activation cache supplies
            their output.
    """
    work = adapted_work(plan, model, trains_embedding=trains_embedding, cached_layers=cached_layers)
    time = _time_flops(config, model)
    # A learned table needs a gradient; a sinusoidal encoding does not, because it is a constant.
    passes = 1 + trains_embedding * (1 + (config.time_encoding_type == "learned"))
    return replace(
        work,
        trained_parameters=work.trained_parameters + _time_parameters(config, model) * trains_embedding,
        flops_per_token=work.flops_per_token + time * passes * (not cached_layers),
    )


def _time_parameters(config: ProgressiveConfig, model: ModelConfig) -> int:
    if not config.embeds_time:
        return 0
    table = config.resolved_num_time_steps if config.time_encoding_type == "learned" else 0
    return (model.hidden_size + table) * config.time_embedding_dim


def _time_flops(config: ProgressiveConfig, model: ModelConfig) -> float:
    return 2.0 * model.hidden_size * config.time_embedding_dim * config.embeds_time / model.seq_length
