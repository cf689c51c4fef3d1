"""Adds NP components to a model that was built without them, for evaluation and generation.

NP components are the factors that generate an NPT layer's weight updates from its attention output.

A training run builds its model with `NPTExtension` instead, so that checkpoints and optimizer include the components.
"""

from collections.abc import Mapping

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import initialize_parameters
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward
from megatron_ext.npt.modules.npt_layers import np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.weights.np_factors import load_np_factors


def convert(chunks: list[GPTModel], settings: NPTModuleConfig) -> None:
    """Adds NP components, not yet initialized, to the layers that the settings name.

    Args:
        chunks: this rank's model chunks, unwrapped, without NP components.
        settings: the configuration of the NP components.

    Raises:
        ValueError: the settings do not fit the model.
    """
    config = chunks[0].config
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    settings.check_model(config.gated_linear_unit, layers[0].changes_outputs if layers else None)
    chosen = settings.layers(config.num_layers)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 in chosen:
                layer.feed_forward = NPFeedForward(
                    layer.config, layer.layer_number, layer.pg_collection, settings=settings
                ).train(layer.training)


@torch.no_grad()
def initialize_np_factors(chunks: list[GPTModel], seed: int) -> None:
    """Initializes all NP components with the values that a training run with this seed starts from.

    Args:
        chunks: this rank's model chunks, unwrapped.
        seed: seed of the initial values.
    """
    for chunk in chunks:
        parameters = [p for module in np_modules([chunk]).values() for p in module.parameters()]
        for parameter in parameters:
            # Some factors start at zero: the affine constants and, with np_init_strategy `conservative`, the output
            # factors. `initialize_parameters` leaves these unchanged.
            parameter.zero_()
        config = chunk.config
        initialize_parameters(chunk, seed, config.init_method_std, config.num_layers, only=parameters)


def attach(chunks: list[GPTModel], settings: NPTModuleConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Adds NP components with the given factors to the layers. Collective over pipeline-parallel ranks.

    Args:
        chunks: this rank's model chunks, unwrapped, without NP components.
        settings: the configuration of the NP components.
        tensors: the factors of the NP components, as returned by `gather_np_factors`.

    Raises:
        ValueError: the settings or the factors do not fit the model.
    """
    convert(chunks, settings)
    load_np_factors(chunks, dict(tensors))
