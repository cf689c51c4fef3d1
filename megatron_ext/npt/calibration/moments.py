"""Second moments of the base model's layers, accumulated in one pass over calibration tokens.

    u = c(a) / rms(h + a)            what fc1 reads of the attention output; c centres it for LayerNorm only
    inputs       E u u^T             attention     E a a^T
    metric       E d d^T,  d = dL/du           output      E e e^T,  e = dL/d(layer output)

L is the model's negative log-likelihood of labels that are sampled from the model itself: then E d d^T is the Fisher
information, and 1/2 E (d . x)^2 the loss KL(base || changed) of a small change x of u, to second order. `attention` and
`output` are the same for `down`, which returns a to the residual stream. Without gradients (`metric` "output") the
metric is that of fc1's output, diag(g) W^T W diag(g), with the norm's weight g; `factors` computes it from the weights.

Every matrix is [h, h] in fp64, a mean over tokens: those of all data-parallel ranks and, under sequence parallelism, of
all tensor-parallel ranks. Ranks hold the moments of their own stage's layers. Which labels are sampled depends on the
sample and the seed, not on the parallel layout.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.key_value import centred
from megatron_ext.npt.objective.fidelity_loss import log_probabilities
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import NoLoss, OutputLoss

UNIFORM = "calibration_uniform"
"""Name of the batch field with a uniform random number per token, [b, s] in fp64, from which its label is sampled."""

_ROWS_AT_ONCE = 1 << 24
"""Number of probabilities that a rank sums up at a time."""


@dataclass
class LayerMoments:
    """Means over tokens of one layer, each [h, h] in fp64; see the top of this file."""

    inputs: torch.Tensor
    metric: torch.Tensor
    attention: torch.Tensor
    output: torch.Tensor

    @classmethod
    def zeros(cls, size: int) -> "LayerMoments":
        """Returns moments of no tokens."""
        device = process_groups.device()
        return cls(*(torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(4)))

    def parts(self) -> list[torch.Tensor]:
        """Returns the four matrices."""
        return [self.inputs, self.metric, self.attention, self.output]


@dataclass
class _Pass:
    """What the hooks know about the micro-batches that are being run."""

    kept: list[torch.Tensor] = field(default_factory=list)
    """For each micro-batch, which of its samples count, [b]."""

    scale: float = 1.0
    """Factor that turns gradients of the run's loss into those of the sum over tokens."""


def collect_moments(
    chunks: list[GPTModel],
    layers: Collection[int],
    batches: Iterator[Batch],
    samples: int,
    *,
    gradients: bool,
    seed: int,
) -> dict[int, LayerMoments]:
    """Returns the moments of this stage's layers; collective.

    Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation; their parameters are frozen.
        layers: indices of layers, from 0, on any stage.
        batches: this data-parallel rank's micro-batches; the ranks' n-th micro-batches, in the order of the ranks, hold
            consecutive samples.
        samples: number of samples to use.
        gradients: whether to compute `metric` and `output`, which stay zero otherwise.
        seed: seed of the sampled labels.
    """
    run = _Pass()
    hooks = _Hooks(chunks, layers, run, gradients)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    first = tokens = 0
    try:
        while first < samples:
            step, run.kept, count = calibration_step(batches, first, samples, seed)
            # The loss of `run_microbatches` is a mean over tokens of a data-parallel rank, on average.
            copies = parallel_state.get_data_parallel_world_size()
            counted = min(count, samples - first) * step[0]["tokens"].size(1)
            run.scale = counted / copies
            hooks.begin()
            loss = _SampledLoss() if gradients else NoLoss()
            run_microbatches(chunks, [], step, loss, forward_only=not gradients)
            first += count
            tokens += counted
    finally:
        hooks.remove()
    parts = list(chain.from_iterable(moments.parts() for moments in hooks.moments.values()))
    sum_over_ranks(parts, chunks[0].config.sequence_parallel)
    for part in parts:
        part /= tokens
    return hooks.moments


def calibration_step(
    batches: Iterator[Batch], first: int, samples: int, seed: int
) -> tuple[list[Batch], list[torch.Tensor], int]:
    """Returns one micro-batch per pipeline stage, which of their samples count, and the number of samples of all ranks.

    Args:
        batches: this data-parallel rank's micro-batches.
        first: number of the first sample.
        samples: number of samples to use; those after them get a loss of zero.
        seed: seed of the sampled labels.
    """
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    step, kept, count = [], [], 0
    for _ in range(parallel_state.get_pipeline_model_parallel_world_size()):
        batch = next(batches)
        size, length = batch["tokens"].shape
        numbers = [first + count + rank * size + row for row in range(size)]
        counts = torch.tensor([number < samples for number in numbers])
        uniform = [
            torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + number))
            for number in numbers
        ]
        names = ("tokens", "labels", "position_ids")
        step.append(
            {
                **{name: batch[name] for name in names},
                "loss_mask": counts.float().unsqueeze(1).expand(size, length),
                UNIFORM: torch.stack(uniform),
            }
        )
        kept.append(counts.to(process_groups.device()))
        count += size * copies
    return step, kept, count


class _Hooks:
    """Hooks on the layers of one rank that add to their moments."""

    def __init__(self, chunks: list[GPTModel], layers: Collection[int], run: _Pass, gradients: bool) -> None:
        self.moments: dict[int, LayerMoments] = {}
        self._run, self._gradients = run, gradients
        self._attention: torch.Tensor | None = None
        self._passes: dict[int, int] = {}
        """Maps each layer to the number of micro-batches that it has begun; a stage runs them in order."""
        self._handles: list[Any] = []
        for chunk in chunks:
            for place, layer in enumerate(chunk.decoder.layers):
                if place == 0 and gradients:
                    self._handles.append(layer.register_forward_pre_hook(_need_gradient, with_kwargs=True))
                if layer.layer_number - 1 in layers:
                    self._add(layer)

    def begin(self) -> None:
        """Begins a run over new micro-batches."""
        self._passes = {}

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: Any) -> None:
        number = layer.layer_number - 1
        self.moments[number] = LayerMoments.zeros(layer.config.hidden_size)
        self._handles += [
            layer.self_attention.register_forward_hook(self._after_attention),
            layer.pre_mlp_layernorm.register_forward_hook(
                lambda norm, args, normed: self._after_norm(layer, args[0], normed)
            ),
            layer.register_forward_hook(lambda _, args, output: self._after_layer(number, output[0])),
        ]

    def _after_attention(self, _: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        values, bias = output
        # A copy: without gradients the engine adds the residual in place.
        self._attention = values.detach().clone() if bias is None else (values + bias).detach()

    def _after_norm(self, layer: Any, x: torch.Tensor, normed: torch.Tensor) -> None:
        number = layer.layer_number - 1
        index = self._passes[number] = self._passes.get(number, -1) + 1
        moments, kept = self.moments[number], self._run.kept[index]
        assert self._attention is not None, "attention runs before the norm"
        attention = self._attention.float()
        square = centred(x.detach().float(), layer.config).square().mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(square + layer.config.layernorm_epsilon)
        _add_products(moments.inputs, centred(attention, layer.config) * inverse_rms, kept)
        _add_products(moments.attention, attention, kept)
        if self._gradients:
            weight, scale = layer.pre_mlp_layernorm.weight.detach().float(), self._run.scale
            normed.register_hook(
                lambda grad: _add_products(moments.metric, grad.float() * (weight * scale), kept)
            )

    def _after_layer(self, number: int, output: torch.Tensor) -> None:
        if self._gradients:
            moments, scale = self.moments[number], self._run.scale
            kept = self._run.kept[self._passes[number]]
            output.register_hook(lambda grad: _add_products(moments.output, grad.float() * scale, kept))


def _need_gradient(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Lets a gradient reach the first layer of a chunk, although no parameter needs one."""
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


def sum_over_ranks(parts: Iterable[torch.Tensor], sequence_parallel: bool) -> None:
    """Adds up sums over tokens, of which every rank has seen its own; in place, collective."""
    groups = [parallel_state.get_data_parallel_group()]
    if sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for part in parts:
        for group in groups:
            dist.all_reduce(part, group=group)


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
    """Samples a token from every softmax by inverting its distribution function; independent of the layout.

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
    # The label is the number of tokens whose share of the distribution lies below the random number.
    threshold = uniform * before[-1] - before[group.rank()]
    found = (summed <= threshold.unsqueeze(-1)).sum(-1)
    dist.all_reduce(found, group=group)
    return found.clamp_max(logits.size(-1) * group.size() - 1)
