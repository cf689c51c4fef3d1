"""The frozen trunk, for the activation cache: its tensors, its fingerprint, and a forward pass of only the trunk.

The trunk is the part of the model that computes the input of layer k: the embedding, what model families add to the
embedding, and layers 0 to k - 1. Its fingerprint is a digest of all its weights, the adapters' scale, the precision and
the configurations. Other parallel layouts give other fingerprints.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_ids import digest
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.gpt_model import HIDDEN_STATES, GPTModel, only_layers
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import merge_over_ranks
from megatron_ext.training.frozen_forward import run_frozen
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import NoLoss

_ABOVE = ("decoder.final_layernorm.", "output_layer.")


def trunk_tensors(chunks: Iterable[GPTModel], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and the value of each trunk tensor on this rank; layers are numbered over the whole model.

    Args:
        chunks: this rank's model chunks, unwrapped.
        layers: k, the number of layers in the trunk.
    """
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            if name.startswith(_ABOVE):
                continue
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                number = numbers[int(parts[2])]
                if number >= layers:
                    continue
                name = ".".join(["decoder", "layers", str(number), *parts[3:]])
            yield name, tensor


def check_frozen(chunks: Iterable[GPTModel], layers: int) -> None:
    """Checks that no tensor of the trunk on this rank is trainable.

    Raises:
        ValueError: a tensor is trainable; the message names it.
    """
    for name, tensor in trunk_tensors(chunks, layers):
        if tensor.requires_grad:
            tied = name == "embedding.word_embeddings.weight"
            hint = "--untie-embeddings-and-output-weights" if tied else "--no-cache-activations"
            raise ValueError(
                f"trunk parameter {name} is trainable, but --cache-activations requires a frozen trunk; pass {hint}"
            )


def without_dropout(chunks: Iterable[GPTModel], layers: int) -> None:
    """Sets a frozen trunk to evaluation mode for the rest of a training step, so that it has no dropout."""
    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.eval()
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 < layers:
                layer.eval()


def trunk_version(chunks: Iterable[GPTModel], layers: int) -> int:
    """Returns a number that changes whenever a tensor of the trunk is modified in place."""
    # torch counts the in-place changes of every tensor; reading the count is much cheaper than the fingerprint.
    return sum(tensor._version for _, tensor in trunk_tensors(chunks, layers))


def trunk_fingerprint(
    chunks: list[GPTModel], families: list[Family], layers: int, identity: Mapping[str, Any]
) -> bytes:
    """Returns a 16-byte digest that differs for trunks that compute different values.

    Collective over the model-parallel ranks.

    Args:
        chunks: this rank's model chunks, unwrapped.
        families: all model families of the run. Their configurations are part of the digest, except for fields that may
            change when a run is resumed.
        layers: k, the number of layers in the trunk.
        identity: further JSON values on which the trunk's output depends.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    local = {(name, rank): digest([tensor]) for name, tensor in trunk_tensors(chunks, layers)}
    for number, name, linear in adapted_linears(chunks):
        if number < layers:
            shapes = {
                adapter: str(getattr(module, "shape", None)) for adapter, module in linear.adapters.items()
            }
            local[f"{number}.{name}", rank] = f"{linear.precision} {shapes}".encode()
    merged = merge_over_ranks(local, parallel_state.get_model_parallel_group())
    rest = {
        "identity": identity,
        "layers": layers,
        "engine": {name: str(value) for name, value in vars(chunks[0].config).items() if _is_plain(value)},
        "families": {
            family.name: _fixed(family.configuration(), family.free_on_resume) for family in families
        },
        "device": process_groups.device().type,
        "torch": torch.__version__,
    }
    parts = [
        part for (name, rank), value in sorted(merged.items()) for part in (f"{name}/{rank}".encode(), value)
    ]
    return digest([json.dumps(rest, sort_keys=True, default=str).encode(), *parts])


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, torch.dtype))


def _fixed(configuration: Mapping[str, Any], free: Container[str]) -> dict[str, Any]:
    """Returns a model family's configuration without the keys in `free`, which may change when a run is resumed."""
    return {
        name: _fixed(value, free) if isinstance(value, Mapping) else value
        for name, value in configuration.items()
        if name not in free
    }


def run_trunk(
    chunks: list[GPTModel], families: list[Family], batches: list[Batch], layers: int
) -> list[torch.Tensor]:
    """Runs the trunk without dropout. Collective over the pipeline stages.

    Args:
        chunks: this rank's model chunks, unwrapped.
        families: all model families of the run.
        batches: micro-batches on the device; the pipeline schedule must support their number.
        layers: k, the number of layers in the trunk.

    Returns:
        The input of layer k for every micro-batch, [s, b, h] ([s/t, b, h] with sequence parallelism), on the stage that
        holds this layer; an empty list on other stages.
    """
    above = [layer for chunk in chunks for layer in chunk.decoder.layers if layer.layer_number - 1 == layers]
    with only_layers(chunks, end=layers):
        states = run_frozen(chunks, families, batches, {HIDDEN_STATES: above[0]} if above else {}, NoLoss())
    return [of_batch[HIDDEN_STATES] for of_batch in states if of_batch]
