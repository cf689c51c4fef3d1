"""Form key_value: the delta adds the effect that `a` has on the base layer's MLP input.

    n = LN2(h),  m = LN2(h + a)                            input of the MLP in the NPT layer, and in the base layer
    m = b + rho (n - b) + g * c(a) / rms(h + a)            rho = rms(h) / rms(h + a), the gain

g and b are weight and bias of the norm. RMSNorm: c(x) = x, b = 0. LayerNorm: c(x) = x - mean(x). In both cases
rms(x) = sqrt(mean(c(x)^2) + eps), with the norm's eps. Apart from two scalars per token, m - n is linear in a. Maps A
B of rank r replace the identity, one for fc1 (gate and up together) and one for `down`:

    fc1     y = W (b + rho (n - b) + g * (u A B))          u = c(a) / rms(h + a)           A: [h, r], B: [r, h]
    down    y = W x + a A B                                                                A: [h, r], B: [r, h]

    as a delta of the weight:  v (x) key + (rho - 1) W     v = W d,  d = g * (u A B) + (1 - rho) b,  key = n / |n|^2
                    down       v (x) key                   v = a A B,                                key = x / |x|^2

v (x) key, the outer product of value and key, is the form outer_product with the right factor n / |n|^2 instead of a
generated v_a. With A B = I, which requires r = h, y of fc1 equals W m, so that the layer equals the base layer; and
the delta of `down` adds a, which --np-residual drop leaves out. `np_scale` multiplies the delta, that is u, a and rho
- 1. Since v is W times a vector of width h, only the input of fc1 changes, and the factors have 2 r h parameters
whatever the width of the MLP.

Shapes: h, a, n [s, b, h] ([s/t, b, h] under sequence parallel); rho and 1 / rms(h + a) [s, b, 1] in fp32. The factors
are replicated over tensor-parallel ranks.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.ops.add_product import add_product
from megatron_ext.models.ops.norm import full_weight
from megatron_ext.npt.modules.modulation import Modulation
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig


class KeyValueModulation(Modulation):
    """The factors of fc1 or of `down` in the form key_value; see the formulas at the top of this file."""

    output_name = "B"

    def build(self) -> None:
        """Creates the parameters A and B."""
        hidden, rank = self.config.hidden_size, self.total_rank
        self.add_factor("A", (hidden, rank), hidden**-0.5)
        self.add_factor("B", (rank, hidden), self.output_std(rank**-0.5))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Returns |x|^2, the divisor in the key x / |x|^2, [.., 1] in fp32; used only to compute the delta's norm."""
        return x.float().square().sum(-1, keepdim=True)

    def coefficients(self, x: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Returns scale * a A for `down`, and scale * c(a) A for fc1, not yet divided by rms(h + a); x is not used."""
        if not self.reads_ffn:
            attention_output = centred(attention_output, self.config)
        return attention_output @ self.A * self.settings.np_scale

    def fc1_input(
        self, norm: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        """Returns the input of fc1, b + rho (n - b) + g * (u A B), [s, b, h].

        Args:
            norm: LN2, the norm before the MLP.
            hidden_states: h, [s, b, h] ([s/t, b, h] under sequence parallel).
            attention_output: a, of the same shape.
        """
        gain, inverse_rms = norm_gain(hidden_states, attention_output, self.settings, self.config)
        normed = with_gain(norm(hidden_states), gain, norm)
        factor = (self.B * full_weight(norm)).to(self.B.dtype)
        return add_product(normed, self.code(attention_output, inverse_rms), factor)

    def code(self, attention_output: torch.Tensor, inverse_rms: torch.Tensor) -> torch.Tensor:
        """Returns scale * u A of fc1, [s, b, r], from a and 1 / rms(h + a)."""
        code = self.coefficients(attention_output, attention_output)
        return code * inverse_rms.to(code.dtype)


class _Gain(torch.autograd.Function):
    """Computes rho and 1 / rms(h + a). For the backward pass it saves h and a, which exist anyway, but not h + a in
    fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor, config: TransformerConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = centred(hidden_states.float(), config)
        m = centred(attention_output.float(), config) + h
        of_h, of_m = (_mean_square(x) + config.layernorm_epsilon for x in (h, m))
        inverse_rms = of_m.rsqrt()
        gain = of_h.sqrt() * inverse_rms
        ctx.save_for_backward(hidden_states, attention_output, of_h, inverse_rms, gain)
        ctx.config = config
        return gain, inverse_rms

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, attention_output, of_h, inverse_rms, gain = ctx.saved_tensors
        grad_gain, grad_inverse = grads
        size = hidden_states.size(-1)
        h = centred(hidden_states.float(), ctx.config)
        m = centred(attention_output.float(), ctx.config) + h
        # The derivatives with respect to the two mean squares, times the derivative of a mean square, 2 x / size.
        by_m = -(grad_gain * gain + grad_inverse * inverse_rms) * inverse_rms.square() / size
        by_h = grad_gain * gain / of_h / size
        grad_a = by_m * m
        grad_h = by_h * h + grad_a
        return grad_h.to(hidden_states.dtype), grad_a.to(attention_output.dtype), None


def _mean_square(values: torch.Tensor) -> torch.Tensor:
    # The vector norm needs no tensor of squares.
    return torch.linalg.vector_norm(values, dim=-1, keepdim=True).square() / values.size(-1)


def norm_gain(
    hidden_states: torch.Tensor,
    attention_output: torch.Tensor,
    settings: NPTModuleConfig,
    config: TransformerConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the applied gain, 1 + scale (rho - 1), and 1 / rms(h + a), both [s, b, 1] in fp32.

    Args:
        hidden_states: h, [s, b, h] ([s/t, b, h] under sequence parallel).
        attention_output: a, of the same shape.
        settings: NPT's configuration.
        config: megatron-core's transformer configuration, which names the norm and its eps.
    """
    gain, inverse_rms = _Gain.apply(hidden_states, attention_output, config)
    return (gain if settings.np_scale == 1 else 1 + settings.np_scale * (gain - 1)), inverse_rms


def with_gain(normed: torch.Tensor, gain: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """Returns b + rho (n - b) for the output n of a norm with bias b; rho n for a norm without bias."""
    gain = gain.to(normed.dtype)
    bias = norm_bias(norm)
    return normed * gain if bias is None else torch.lerp(bias, normed, gain)


def norm_bias(norm: torch.nn.Module) -> torch.Tensor | None:
    """Returns the bias of a norm, or None."""
    return getattr(norm, "bias", None)


def centred(values: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Returns c(x): x without its mean over the last dimension for LayerNorm, x itself for RMSNorm."""
    return values - values.mean(-1, keepdim=True) if config.normalization == "LayerNorm" else values
