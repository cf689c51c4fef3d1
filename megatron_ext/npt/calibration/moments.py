"""Second moments of the base model's layers, accumulated in one pass over calibration tokens.

    u = c(a) / rms(h + a)            the attention output's part of fc1's input; c subtracts the mean (LayerNorm only)
    inputs       E u u^T             attention     E a a^T
    metric       E d d^T,  d = dL/du           output      E e e^T,  e = dL/d(layer output)

L is the model's negative log-likelihood of labels that are sampled from the model itself. Then E d d^T is the Fisher
information: to second order, a small change x of u causes a KL(base || changed) of 1/2 E (d . x)^2. `attention` and
`output` are the same quantities for `down`, which adds a to the residual stream. Without gradients (`metric`
"output"), `factors` computes the metric of fc1's output from the weights: diag(g) W^T W diag(g), with the norm's
weight g.

Every matrix is [h, h] in fp64, a mean over the tokens of all data-parallel ranks and, under sequence parallelism, of
all tensor-parallel ranks. A rank holds the moments of its own stage's layers. The sampled labels depend on the sample
and the seed, not on the parallel layout.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.norm import full_weight
from megatron_ext.npt.calibration.calibration_run import (
    UNIFORM,
    LayerHooks,
    MLPInput,
    calibration_steps,
    sum_over_ranks,
)
from megatron_ext.npt.modules.key_value import centred
from megatron_ext.npt.objective.fidelity_loss import log_probabilities
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import NoLoss, OutputLoss

_ROWS_AT_ONCE = 1 << 24
"""Number of probabilities that a rank adds up at a time."""


@dataclass
class LayerMoments:
    """Means over tokens of one layer, each [h, h] in fp64; see the top of this file."""

    inputs: torch.Tensor
    metric: torch.Tensor
    attention: torch.Tensor
    output: torch.Tensor

    @classmethod
    def zeros(cls, size: int) -> "LayerMoments":
        """Returns moments over zero tokens."""
        device = process_groups.device()
        return cls(*(torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(4)))

    def parts(self) -> list[torch.Tensor]:
        """Returns the four matrices."""
        return [self.inputs, self.metric, self.attention, self.output]


def collect_moments(
    chunks: list[GPTModel],
    layers: Collection[int],
    batches: Iterator[Batch],
    samples: int,
    *,
    gradients: bool,
    seed: int,
    name: str = "calibration",
) -> dict[int, LayerMoments]:
    """Returns the moments of this stage's layers; collective.

    Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation; their parameters are frozen.
        layers: indices of layers, from 0; layers of other pipeline stages are ignored.
        batches: this data-parallel rank's micro-batches; the ranks' n-th micro-batches, in the order of the ranks, hold
            consecutive samples.
        samples: number of samples to use.
        gradients: whether to compute `metric` and `output`, which stay zero otherwise.
        seed: seed of the sampled labels.
        name: name of this pass, for its progress.
    """
    hooks = _Hooks(chunks, layers, gradients)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    tokens = 0
    try:
        for step in calibration_steps(batches, samples, seed, name=name):
            hooks.begin(step)
            # The loss of `run_microbatches` is a mean over the tokens of a data-parallel rank, which megatron-core
            # multiplies by the context-parallel size.
            hooks.scale = step.tokens / parallel_state.get_data_parallel_world_size(
                with_context_parallel=True
            )
            loss = _SampledLoss() if gradients else NoLoss()
            run_microbatches(chunks, [], step.batches, loss, forward_only=not gradients)
            tokens += step.tokens
    finally:
        hooks.remove()
    parts = list(chain.from_iterable(moments.parts() for moments in hooks.moments.values()))
    sum_over_ranks(parts, chunks[0].config.sequence_parallel)
    for part in parts:
        part /= tokens
    return hooks.moments


class _Hooks(LayerHooks):
    """Hooks that add to the moments of the layers."""

    def __init__(self, chunks: list[GPTModel], layers: Collection[int], gradients: bool) -> None:
        super().__init__(chunks, layers)
        self.scale = 1.0
        """Factor that converts gradients of the run's loss to gradients of the sum over tokens."""
        self.moments = {
            layer.layer_number - 1: LayerMoments.zeros(layer.config.hidden_size) for layer in self.layers
        }
        self._gradients = gradients
        if gradients:
            self._follow_gradients(chunks)

    def _follow_gradients(self, chunks: list[GPTModel]) -> None:
        for chunk in chunks:
            first = chunk.decoder.layers[0]
            self.handles.append(first.register_forward_pre_hook(_need_gradient, with_kwargs=True))
        for layer in self.layers:
            number = layer.layer_number - 1
            self.handles.append(
                layer.register_forward_hook(
                    lambda _, args, output, number=number: self._after_layer(number, output[0])
                )
            )

    def before_mlp(self, layer: Any, seen: MLPInput) -> None:
        """Adds u u^T and a a^T to the moments now, and d d^T in the backward pass."""
        moments, kept = self.moments[layer.layer_number - 1], seen.kept
        attention = seen.attention.float()
        _add_products(moments.inputs, centred(attention, layer.config) * seen.inverse_rms, kept)
        _add_products(moments.attention, attention, kept)
        if self._gradients:
            weight, scale = full_weight(layer.pre_mlp_layernorm).detach().float(), self.scale
            seen.normed.register_hook(
                lambda grad: _add_products(moments.metric, grad.float() * (weight * scale), kept)
            )

    def _after_layer(self, number: int, output: torch.Tensor) -> None:
        moments, scale, kept = self.moments[number], self.scale, self.kept(number)
        output.register_hook(lambda grad: _add_products(moments.output, grad.float() * scale, kept))


def _need_gradient(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Lets a gradient reach the first layer of a chunk, although all parameters are frozen."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if not hidden_states.requires_grad:
        hidden_states = hidden_states.detach().requires_grad_()
    return (hidden_states, *args[1:]) if args else args, kwargs if args else {
        **kwargs,
        "hidden_states": hidden_states,
    }


def _add_products(total: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> None:
    """Adds the sum of x x^T over the tokens of the samples that count; values [s, b, h], kept [b]."""
    rows = values.detach()[:, kept].reshape(-1, values.size(-1)).double()
    total.addmm_(rows.t(), rows)


class _SampledLoss(OutputLoss):
    """Sum over tokens of -log p(label), for labels sampled from the model's own distribution."""

    reads = "logits"
    names = ()

    def __call__(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of one micro-batch; logs nothing."""
        logits = output.transpose(0, 1).contiguous()
        labels = sample_labels(logits.detach(), batch[UNIFORM].t(), model.pg_collection.tp)
        losses = model.compute_language_model_loss(labels.t(), logits)
        return (losses.float() * batch["loss_mask"]).sum(), {}


def sample_labels(logits: torch.Tensor, uniform: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Samples a token at every position by inverting the softmax's cumulative distribution.

    The result does not depend on the parallel layout.

    Args:
        logits: [s, b, V/t].
        uniform: numbers in [0, 1), [s, b] in fp64.
        group: the ranks over which the vocabulary is split.

    Returns:
        Token ids, [s, b].
    """
    rows = max(1, _ROWS_AT_ONCE // (logits.size(1) * logits.size(2)))
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    return torch.cat([_sample(part, numbers, group) for part, numbers in parts])


def _sample(logits: torch.Tensor, uniform: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    summed = log_probabilities(logits, group).exp().double().cumsum(-1)
    totals = [torch.empty_like(summed[..., -1]) for _ in range(group.size())]
    dist.all_gather(totals, summed[..., -1].contiguous(), group=group)
    before = torch.stack([torch.zeros_like(uniform), *totals]).cumsum(0)
    # The label is the number of tokens whose cumulative probability lies below the random number.
    threshold = uniform * before[-1] - before[group.rank()]
    found = (summed <= threshold.unsqueeze(-1)).sum(-1)
    dist.all_reduce(found, group=group)
    return found.clamp_max(logits.size(-1) * group.size() - 1)
