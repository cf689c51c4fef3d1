"""What a training step asks of an NPT layer: which inputs it gets, and what is added to its output's gradient."""

from typing import Any, Protocol

import torch

from megatron_ext.models.auxiliary_inputs import LayerInputs


class LayerStep(Protocol):
    """One training step of one layer; the training objective implements it."""

    def inputs(
        self, hidden_states: torch.Tensor, layer_inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention's and the MLP's input [s, b, h], from the student's [s, b, h] and the auxiliary streams."""

    def attach(
        self,
        module: Any,
        layer: Any,
        inputs: tuple[torch.Tensor, torch.Tensor],
        attention_output: torch.Tensor,
        mlp_output: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output with its losses attached.

        Args:
            module: the layer's `NPFeedForward`.
            layer: the layer.
            inputs: h as the layer gets it, and as the MLP gets it.
            attention_output: a.
            mlp_output: MLP*(n).
            output: the layer's output.
        """
