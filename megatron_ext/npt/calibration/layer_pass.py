"""Runs the base model on calibration tokens and calls a function with the values that each layer computes."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.calibration.calibration_run import LayerHooks, MLPInput, calibration_steps
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import NoLoss


@dataclass
class LayerTokens:
    """Values that one layer of the base model computes for a micro-batch."""

    kept: torch.Tensor
    """Boolean mask [b] of the samples that count."""

    attention: torch.Tensor
    """a, [s, b, h] ([s/t, b, h] with sequence parallelism)."""

    normed: torch.Tensor
    """n = LN2(h); same shape as a."""

    mlp_input: torch.Tensor
    """m = LN2(h + a); same shape as a."""

    inverse_rms: torch.Tensor
    """1 / rms(h + a), [.., 1]."""

    activated: torch.Tensor | None = None
    """Input of `down` in the base layer, [s, b, f/t]."""

    mlp_output: torch.Tensor | None = None
    """Output of `down` without bias; same shape as a."""

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the values of those tokens that are used for calibration, [n, ..]."""
        return values[:, self.kept].flatten(0, 1)


Visit = Callable[[int, Any, LayerTokens], None]
"""A function that is called with a layer's index, the layer, and the layer's values for a micro-batch. All ranks of a
tensor-parallel group call it together.
"""


@torch.no_grad()
def visit_layers(
    chunks: list[GPTModel],
    layers: Collection[int],
    batches: Iterator[Batch],
    samples: int,
    visit: Visit,
    *,
    name: str,
) -> None:
    """Runs the base model on the first samples, and calls `visit` with each layer's values. Collective.

    Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation.
        layers: indices of the layers to visit, from 0; layers of other pipeline stages are ignored.
        batches: this data-parallel rank's micro-batches; the ranks' n-th micro-batches, in the order of the ranks, hold
            consecutive samples.
        samples: number of samples to use.
        visit: called for every layer and micro-batch.
        name: name of this pass, for its progress.
    """
    hooks = _Hooks(chunks, layers, visit)
    for chunk in chunks:
        chunk.eval()
    try:
        for step in calibration_steps(batches, samples, name=name):
            hooks.begin(step)
            run_microbatches(chunks, [], step.batches, NoLoss(), forward_only=True)
    finally:
        hooks.remove()


class _Hooks(LayerHooks):
    """Hooks that collect the tensors of a layer and pass them to `visit` after its MLP has run."""

    def __init__(self, chunks: list[GPTModel], layers: Collection[int], visit: Visit) -> None:
        super().__init__(chunks, layers)
        self._visit = visit
        self._tokens: LayerTokens
        for layer in self.layers:
            self.handles.append(
                layer.mlp.linear_fc2.register_forward_hook(
                    lambda fc2, args, output, layer=layer: self._after_fc2(layer, args[0], output[0])
                )
            )

    def before_mlp(self, layer: Any, seen: MLPInput) -> None:
        """Stores the values that are known before the MLP."""
        self._tokens = LayerTokens(
            kept=seen.kept,
            attention=seen.attention,
            # Call `forward`, because calling the module would also call its hooks.
            normed=layer.pre_mlp_layernorm.forward(seen.residual - seen.attention),
            mlp_input=seen.normed,
            inverse_rms=seen.inverse_rms,
        )

    def _after_fc2(self, layer: Any, activated: torch.Tensor, output: torch.Tensor) -> None:
        tokens = self._tokens
        tokens.activated, tokens.mlp_output = activated, output
        self._visit(layer.layer_number - 1, layer, tokens)
