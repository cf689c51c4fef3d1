"""Gated activations in which only the largest gates are nonzero: Gaussian top-k, as in Gemma 3n.

    Sparse(x) = act(relu(gate - (mean + z deviation))) * up,   [gate ; up] = W_fc1 x

Mean and deviation are taken over a token's f gate values. z is the standard normal quantile of `sparsity`, so that
this fraction of normally distributed values lies below the cutoff. Under tensor parallelism, each rank has f/t of the
values; one gather of the ranks' means and variances gives the mean and variance of all f values.
Source: Gemma 3n, after "Spark Transformer" (arXiv 2506.06644). Shapes: [s, b, 2 f/t] -> [s, b, f/t].
"""

from statistics import NormalDist
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.ops.gated_activations import GELU_TANH, SILU, GateActivation


class _Sparse(torch.autograd.Function):
    """The autograd function. It saves its input and two numbers per token; the backward pass recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, gate_and_up: torch.Tensor, activation: GateActivation, z: float, group: dist.ProcessGroup
    ) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        mean, deviation = _moments(gate, group)
        ctx.save_for_backward(gate_and_up, mean, deviation)
        ctx.activation, ctx.z, ctx.group = activation, z, group
        return activation.value(_above(gate, mean + z * deviation)).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gate_and_up, mean, deviation = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        above = _above(gate, mean + ctx.z * deviation)
        grad = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], ctx.activation.value(above), out=grad_up)
        ctx.activation.write_gradient(grads[0] * up, above, grad_gate)
        grad_gate.mul_(above > 0)
        # The gradient of the cutoff is minus the sum of the gates' gradients; the derivative of the cutoff with
        # respect to a gate is (1 + z (gate - mean) / deviation) / f.
        total = grad_gate.sum(-1, keepdim=True, dtype=torch.float32)
        if ctx.group.size() > 1:
            dist.all_reduce(total, group=ctx.group)
        total.div_(gate.size(-1) * ctx.group.size())
        slope = total * ctx.z / deviation.clamp_min(torch.finfo(torch.float32).tiny)
        grad_gate.sub_((slope * (gate - mean)).add_(total))
        return grad, None, None, None


def _above(gate: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    return (gate - cutoff).relu_().to(gate.dtype)


def _moments(gate: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation [s, b, 1], in fp32, of a token's gates; each rank has [s, b, f/t] of them."""
    variance, mean = torch.var_mean(gate.float(), dim=-1, keepdim=True, correction=0)
    if group.size() > 1:
        own = torch.stack((mean, variance))
        of_ranks = own.new_empty(group.size() * 2, *mean.shape)
        dist.all_gather_into_tensor(of_ranks, own, group=group)
        means, variances = of_ranks.unflatten(0, (-1, 2)).unbind(1)
        # All ranks have equally many values, so the variance is the mean of the ranks' variances plus the variance of
        # their means.
        between, mean = torch.var_mean(means, dim=0, correction=0)
        variance = variances.mean(0) + between
    return mean, variance.sqrt_()


class SparseGatedActivation(MegatronModule):
    """The formula at the top of this file, for the `activation_func` entry of the engine's MLP spec."""

    def __init__(self, config: TransformerConfig, *, sparsity: float, has_gelu: bool) -> None:
        """Args:
        config: the engine's configuration.
        sparsity: fraction of the gates that are set to zero, above 0 and below 1.
        has_gelu: whether the activation is GELU in its tanh approximation; else SiLU.
        """
        super().__init__(config)
        self.activation = GELU_TANH if has_gelu else SILU
        self.z = NormalDist().inv_cdf(sparsity)

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Applies the activation, [s, b, 2 f/t] -> [s, b, f/t]."""
        group = parallel_state.get_tensor_model_parallel_group()
        result: torch.Tensor = _Sparse.apply(gate_and_up, self.activation, self.z, group)
        return result
