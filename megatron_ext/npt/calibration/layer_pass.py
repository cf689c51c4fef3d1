"""One forward pass of the base model over calibration tokens, in which a function sees what each layer computes."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.calibration.moments import calibration_step
from megatron_ext.npt.modules.key_value import centred
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import NoLoss


@dataclass
class LayerTokens:
    """What one layer of the base model computes of a micro-batch."""

    kept: torch.Tensor
    """Which of the samples count, [b]."""

    attention: torch.Tensor
    """a, [s, b, h] ([s/t, b, h] with sequence parallelism)."""

    normed: torch.Tensor
    """n = LN2(h), like a."""

    mlp_input: torch.Tensor
    """m = LN2(h + a), like a."""

    inverse_rms: torch.Tensor
    """1 / rms(h + a), [.., 1]."""

    activated: torch.Tensor | None = None
    """Input of `down` in the base layer, [s, b, f/t]."""

    mlp_output: torch.Tensor | None = None
    """Output of `down` without bias, like a."""

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the values of the tokens that count, [n, ..]."""
        return values[:, self.kept].flatten(0, 1)


Visit = Callable[[int, Any, LayerTokens], None]
"""Gets the index of a layer, the layer and its tokens; all ranks of a tensor-parallel group call it together."""


@torch.no_grad()
def visit_layers(
    chunks: list[GPTModel], layers: Collection[int], batches: Iterator[Batch], samples: int, visit: Visit
) -> None:
    """Runs the base model over the first samples; collective.

    Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation.
        layers: indices of the layers to visit, from 0, on any stage.
        batches: this data-parallel rank's micro-batches; the ranks' n-th micro-batches, in the order of the ranks, hold
            consecutive samples.
        samples: number of samples to use.
        visit: called for every layer and micro-batch.
    """
    hooks = _Hooks(visit)
    for chunk in chunks:
        chunk.eval()
    for layer in chain.from_iterable(chunk.decoder.layers for chunk in chunks):
        if layer.layer_number - 1 in layers:
            hooks.add(layer)
    first = 0
    try:
        while first < samples:
            step, hooks.kept, count = calibration_step(batches, first, samples, 0)
            hooks.passes = {}
            run_microbatches(chunks, [], step, NoLoss(), forward_only=True)
            first += count
    finally:
        for handle in hooks.handles:
            handle.remove()


class _Hooks:
    """Hooks that collect the tensors of a layer and hand them on when its MLP has run."""

    def __init__(self, visit: Visit) -> None:
        self.kept: list[torch.Tensor] = []
        """For each micro-batch, which of its samples count, [b]."""
        self.passes: dict[int, int] = {}
        """Maps each layer to the number of micro-batches that it has begun; a stage runs them in order."""
        self.handles: list[Any] = []
        self._visit = visit
        self._attention: torch.Tensor
        self._tokens: LayerTokens

    def add(self, layer: Any) -> None:
        """Adds the hooks of one layer."""
        self.handles += [
            layer.self_attention.register_forward_hook(self._after_attention),
            layer.pre_mlp_layernorm.register_forward_hook(
                lambda norm, args, normed: self._after_norm(layer, args[0], normed)
            ),
            layer.mlp.linear_fc2.register_forward_hook(
                lambda fc2, args, output: self._after_fc2(layer, args[0], output[0])
            ),
        ]

    def _after_attention(self, _: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        values, bias = output
        # A copy: without gradients the engine adds the residual in place.
        self._attention = values.clone() if bias is None else values + bias

    def _after_norm(self, layer: Any, x: torch.Tensor, normed: torch.Tensor) -> None:
        number = layer.layer_number - 1
        self.passes[number] = self.passes.get(number, -1) + 1
        square = centred(x.float(), layer.config).square().mean(-1, keepdim=True)
        self._tokens = LayerTokens(
            kept=self.kept[self.passes[number]],
            attention=self._attention,
            # `forward`, because calling the module would call this hook.
            normed=layer.pre_mlp_layernorm.forward(x - self._attention),
            mlp_input=normed,
            inverse_rms=torch.rsqrt(square + layer.config.layernorm_epsilon),
        )

    def _after_fc2(self, layer: Any, activated: torch.Tensor, output: torch.Tensor) -> None:
        tokens = self._tokens
        tokens.activated, tokens.mlp_output = activated, output
        self._visit(layer.layer_number - 1, layer, tokens)
