"""The output of an attention or MLP module, with its bias, as a tensor that nothing changes later."""

import torch


def output_with_bias(returned: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Returns output + bias; a copy of the output if there is no bias.

    The copy is needed because, in a pass without gradients, the engine adds the residual to the output in place.

    Args:
        returned: what the engine's attention or MLP returns, its output [s, b, h] and its bias [h] or None.
    """
    output, bias = returned
    return output.clone() if bias is None else output + bias
