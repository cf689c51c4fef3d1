"""The interface through which the training objective chooses an NPT layer's inputs and attaches the layer's losses."""

from typing import Any, Protocol

import torch

from megatron_ext.models.auxiliary_inputs import LayerInputs


class LayerStep(Protocol):
    """Methods that an NPT layer calls in a training step; implemented by the training objective."""

    def inputs(
        self, hidden_states: torch.Tensor, layer_inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the input of attention and the input of the MLP, both [s, b, h].

        Args:
            hidden_states: the student's hidden states [s, b, h].
            layer_inputs: tensors that accompany the hidden states; they may contain the teacher's hidden states.
        """

    def attach(
        self,
        module: Any,
        layer: Any,
        inputs: tuple[torch.Tensor, torch.Tensor],
        attention_output: torch.Tensor,
        mlp_output: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the layer's output, with the layer's losses attached to its backward pass.

        Args:
            module: the layer's `NPFeedForward`.
            layer: the transformer layer.
            inputs: the layer's input and the MLP's input, both [s, b, h].
            attention_output: the attention output a, [s, b, h].
            mlp_output: the modulated MLP's output MLP*(n), [s, b, h].
            output: the layer's output, [s, b, h].
        """
