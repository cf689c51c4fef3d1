"""Finds the NPT layers that hold the model back, by running each of them in turn as its base layer.

    KL                mean over tokens of KL(base || NPT), nats
    KL without j      the same, but layer j runs as its base layer; all other layers stay converted
    reduction         KL - KL without j: the part of the model's distance from the base model that layer j causes

A layer's own error does not show its effect, because the layers above may enlarge or remove the error. The layers
that hold the model back are the smallest group whose reductions add up to half of all reductions. As a check, all
layers of this group run together as base layers.

A run without layer j starts at layer j, with the layer's input from the run of the whole NPT model.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import HIDDEN_STATES, GPTModel, only_layers
from megatron_ext.npt.evaluation.layer_comparison import CompareOutputs, Sums
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import HiddenStates

Steps = Iterable[list[Batch]]
"""Groups of this rank's micro-batches, as returned by `held_out_steps`."""


@torch.no_grad()
def ablate_layers(
    chunks: list[GPTModel], families: list[Family], layers: tuple[int, ...], read: Callable[[], Steps]
) -> dict[str, Any]:
    """Runs the model once for each NPT layer, with this layer as a base layer. Collective; every rank gets the report.

    Args:
        chunks: this rank's model chunks, unwrapped, with NP components, in evaluation mode.
        families: the model families, which supply the model's auxiliary inputs.
        layers: indices of the model's NPT layers, from 0, over all pipeline stages.
        read: function that returns the micro-batches from the beginning; called twice.
    """
    families = [*families, _KnownInputs()]
    sums = np.zeros((1 + len(layers), 4))
    for step in read():
        base, inputs = _base_outputs(chunks, families, step), dict[int, list[torch.Tensor]]()
        with _recorded_inputs(chunks, layers, inputs):
            run_microbatches(chunks, families, step, CompareOutputs(base, sums[0]), forward_only=True)
        for row, layer in enumerate(layers, start=1):
            known = step
            if layer in inputs:
                known = [batch | {HIDDEN_STATES: h} for batch, h in zip(step, inputs[layer], strict=True)]
            with deactivated(chunks, [layer]), only_layers(chunks, start=layer):
                compare = CompareOutputs(base, sums[row])
                run_microbatches(chunks, families, known, compare, forward_only=True)
    tokens, kl = _mean_kl(sums)
    without = dict(zip(layers, kl[1:], strict=True))
    reductions = {layer: kl[0] - value for layer, value in without.items()}
    chosen = holding_back(reductions)
    return {
        "tokens": tokens,
        "kl": kl[0],
        "layers": {
            layer: {"kl_without": without[layer], "kl_reduction": reductions[layer]} for layer in layers
        },
        "holding_back": {"layers": chosen, "kl_without": _kl_without(chunks, families, chosen, read())},
    }


def holding_back(reductions: dict[int, float]) -> list[int]:
    """Returns the smallest group of layers whose reductions add up to half of all positive reductions, the largest
    first.
    """
    positive = {layer: value for layer, value in reductions.items() if value > 0}
    half, chosen, found = sum(positive.values()) / 2, list[int](), 0.0
    for layer in sorted(positive, key=lambda layer: -positive[layer]):
        if found < half:
            chosen.append(layer)
            found += positive[layer]
    return chosen


def _kl_without(chunks: list[GPTModel], families: list[Family], layers: list[int], steps: Steps) -> float:
    sums = np.zeros((1, 4))
    for step in steps:
        base = _base_outputs(chunks, families, step)
        with deactivated(chunks, layers):
            run_microbatches(chunks, families, step, CompareOutputs(base, sums[0]), forward_only=True)
    return _mean_kl(sums)[1][0]


def _base_outputs(chunks: list[GPTModel], families: list[Family], step: list[Batch]) -> HiddenStates:
    outputs = HiddenStates()
    with deactivated(chunks):
        run_microbatches(chunks, families, step, outputs, forward_only=True)
    return outputs


def _mean_kl(sums: Sums) -> tuple[int, list[float]]:
    """Adds up the rows of all ranks; returns the number of tokens and the mean KL of each row."""
    whole = torch.from_numpy(sums).to(process_groups.device())
    # The first reduction adds up the ranks' windows; the second gives every pipeline stage the result of the last
    # one.
    dist.all_reduce(whole, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(whole, group=parallel_state.get_pipeline_model_parallel_group())
    return int(whole[0, 0]), (whole[:, 3] / whole[:, 0]).tolist()


class _KnownInputs(Family):
    """Supplies the known input of the layer at which a run starts."""

    name = "layer_ablation"

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the known input under its name, or nothing if the batch has none."""
        return {HIDDEN_STATES: batch[HIDDEN_STATES]} if HIDDEN_STATES in batch else {}


@contextlib.contextmanager
def _recorded_inputs(
    chunks: list[GPTModel], layers: tuple[int, ...], inputs: dict[int, list[torch.Tensor]]
) -> Iterator[None]:
    """Returns a context in which each layer's input is appended to `inputs`, for every micro-batch."""
    with contextlib.ExitStack() as undo:
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if (number := layer.layer_number - 1) in layers:
                    taken = inputs.setdefault(number, [])

                    def take(
                        _: Any, args: Any, kwargs: dict[str, Any], taken: list[torch.Tensor] = taken
                    ) -> None:
                        taken.append((args[0] if args else kwargs["hidden_states"]).detach())

                    undo.callback(layer.register_forward_pre_hook(take, with_kwargs=True).remove)
        yield
