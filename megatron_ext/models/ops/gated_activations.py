"""The MLP's gated activations, in few passes over memory.

    SwiGLU(x) = silu(gate) * up,   [gate ; up] = W_fc1 x          (arXiv 2002.05202)
    GeGLU(x)  = gelu(gate) * up,   gelu with its tanh approximation, as in Gemma

The forward pass equals the engine's to the bit. The engine's unfused backward pass computes the gradients of both
halves and concatenates them; here both are written into one buffer. Transformer Engine has one kernel for each pass.
Shapes: [s, b, 2 f/t] -> [s, b, f/t].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule


class GateActivation(NamedTuple):
    """The activation of a gate, and its derivative."""

    value: Callable[[torch.Tensor], torch.Tensor]
    write_gradient: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor], object
    ]  # arguments: gradient of the output, input, result to be filled


SILU = GateActivation(
    F.silu, lambda grad, gate, out: torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
)
GELU_TANH = GateActivation(
    partial(F.gelu, approximate="tanh"),
    lambda grad, gate, out: torch.ops.aten.gelu_backward.grad_input(
        grad, gate, approximate="tanh", grad_input=out
    ),
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, activation: GateActivation) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.activation = activation
        gate, up = gate_and_up.chunk(2, dim=-1)
        return activation.value(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], ctx.activation.value(gate), out=grad_up)
        ctx.activation.write_gradient(grads[0] * up, gate, grad_gate)
        return grad, None


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(first half) * second half, [..., 2 f] -> [..., f]."""
    result: torch.Tensor = _Gated.apply(gate_and_up, SILU)
    return result


def geglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Returns gelu(first half) * second half, [..., 2 f] -> [..., f]."""
    result: torch.Tensor = _Gated.apply(gate_and_up, GELU_TANH)
    return result


class SwiGLU(MegatronModule):
    """SwiGLU as a module, for the `activation_func` entry of the engine's MLP spec."""

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Applies SwiGLU, [s, b, 2 f/t] -> [s, b, f/t]."""
        return swiglu(gate_and_up)


class GeGLU(MegatronModule):
    """GeGLU as a module, for the `activation_func` entry of the engine's MLP spec."""

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Applies GeGLU, [s, b, 2 f/t] -> [s, b, f/t]."""
        return geglu(gate_and_up)


class _TESwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        import transformer_engine_torch

        gate_and_up = gate_and_up.contiguous()
        ctx.save_for_backward(gate_and_up)
        result: torch.Tensor = transformer_engine_torch.swiglu(gate_and_up, None)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        import transformer_engine_torch

        (gate_and_up,) = ctx.saved_tensors
        grad: torch.Tensor = transformer_engine_torch.dswiglu(grads[0].contiguous(), gate_and_up, None)
        return grad


class TESwiGLU(MegatronModule):
    """SwiGLU with Transformer Engine's kernels. Transformer Engine's own module is not used, because it would add
    entries to checkpoints.
    """

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Applies SwiGLU, [s, b, 2 f/t] -> [s, b, f/t]."""
        result: torch.Tensor = _TESwiGLU.apply(gate_and_up)
        return result
