"""Adds the bias to the output of an attention or MLP module, in a tensor that later operations do not overwrite."""

import torch


def output_with_bias(returned: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Returns output + bias; a copy of the output if there is no bias.

    The copy is needed because, in a pass without gradients, the engine adds the residual to the output in place.

    Args:
        returned: result of the engine's attention or MLP: output [s, b, h], and bias [h] or None.
    """
    output, bias = returned
    return output.clone() if bias is None else output + bias
