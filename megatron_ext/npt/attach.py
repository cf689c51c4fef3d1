"""Puts NP components into a model that was built without them, for evaluation and generation beside its base.

A training run builds its model with `NPTExtension` instead: there the components are in checkpoints and the optimizer.
"""

from collections.abc import Mapping

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.adapter import load_adapter
from megatron_ext.npt.config import NPTModuleConfig
from megatron_ext.npt.feed_forward import NPFeedForward


def convert(chunks: list[GPTModel], settings: NPTModuleConfig) -> None:
    """Gives the layers that the settings name NP components of which nothing is drawn yet.

    Args:
        chunks: this rank's model chunks, unwrapped, without NP components.
        settings: of the NP components.

    Raises:
        ValueError: the settings do not fit the model.
    """
    config = chunks[0].config
    settings.check_model(config.gated_linear_unit)
    chosen = settings.layers(config.num_layers)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 in chosen:
                layer.feed_forward = NPFeedForward(
                    layer.config, layer.layer_number, layer.pg_collection, settings=settings
                ).train(layer.training)


def attach(chunks: list[GPTModel], settings: NPTModuleConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Converts the layers that the settings name. Collective over pipeline-parallel ranks.

    Args:
        chunks: this rank's model chunks, unwrapped, without NP components.
        settings: of the NP components.
        tensors: their factors, as `gather_adapter` gives them.

    Raises:
        ValueError: the settings or the factors do not fit the model.
    """
    convert(chunks, settings)
    load_adapter(chunks, dict(tensors))
