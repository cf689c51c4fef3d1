"""Computes norms and products of v_a, v_b and the deltas, for losses and monitoring, without building them.

The formulas use Gram matrices of the factors, and depend on the form of the delta (`--np-form`):

    outer_product    z = a W_down            v_a = z W_a_up / sqrt(r) + c_a            v_b = z W_b_up
                     |v_a|^2 = z^ G z^,      z^ = [z / sqrt(r) ; 1],  G = [W_a_up ; c_a] [W_a_up ; c_a]^T
                     v_a . a = z . (W_a_up a) / sqrt(r) + c_a . a
                     |delta|_F^2 = c^2 sum_kl (v_a,k . v_a,l) (v_b,k . v_b,l)
    low_rank         |delta|_F^2 = scale^2 t^T (A^T A * B B^T) t,  t = tanh(a A)
    key_value        |delta|_F^2 = |v|^2 / |n|^2 + 2 (rho - 1) (v . W n) / |n|^2 + (rho - 1)^2 |W|_F^2
                     with v = W d:  |v|^2 = d^T (W^T W) d,  v . W n = d^T (W^T W) n

`GeneratedVectors` uses v_a and v_b as docs/design/npt_sequential.md defines them: without the division of z by its root
mean square (`--np-normalize`) and without the factor 1 / sqrt(input) of v_a. Stage 1 of training makes v_a equal to
a, including its size, which would be impossible if v_a depended only on the direction of a. `delta_norms` measures
the applied delta, with all normalisations.

Overview of the functions. `modulation` holds the factors of one weight matrix; `a` is the attention output, [s, b, h]
([s/t, b, h] with sequence parallelism):

    vectors = GeneratedVectors(modulation, a)         outer_product on gate, up or fc1
    vectors.reconstruction_error()                    [b], mean (v_a - a)^2 of each sequence
    vectors.attention_square()                        [b], mean a^2 of each sequence; the loss divides by its root
    vectors.similarity()                              mean cosine of v_a and a
    vectors.a_square(), vectors.b_square()            mean v_a^2, mean v_b^2; their sum is the regularization loss
    vectors.a_norm(), vectors.b_norm()                mean |v_a|, mean |v_b|; no gradient
    factor_norm(modulation)                           sum of the factors' Frobenius norms: |A|_F + |B|_F for low_rank
    delta_norms(modulation, a, x, layer, h)           [s(/t), b], |delta|_F per token; no gradient
    weight_norm(modulation, mlp)                      |W|_F of the base weight; no gradient

Results without a shape are fp32 scalars. Means are over this rank's tokens and over the components.

Tensor parallelism: `b_square`, `b_norm`, `factor_norm`, `delta_norms` and `weight_norm` are collective over the group.
Without sequence parallelism, all ranks get equal values, and each rank adds these values to its loss. With sequence
parallelism, every rank adds its values divided by t. In both cases the gradients of all factors are correct after the
engine's reduction, which with sequence parallelism sums the gradients of replicated factors over the group.
"""

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from megatron_ext.models.ops.norm import full_weight
from megatron_ext.npt.modules.key_value import KeyValueModulation, norm_bias, norm_gain
from megatron_ext.npt.modules.modulation import LowRankModulation, Modulation, OuterProductModulation

_TINY = 1e-16
"""Lower bound of squared norms before a division or root, so that a vector of zeros has cosine 0 and gradient 0."""


class GeneratedVectors:
    """The vectors v_a and v_b of every token, without normalisation; shared intermediate results are computed once."""

    def __init__(self, modulation: Modulation, attention_output: torch.Tensor) -> None:
        """Args:
        modulation: must have the form outer_product and the target `gate`, `up` or `fc1`.
        attention_output: a, [s, b, h] ([s/t, b, h] with sequence parallelism).

        Raises:
            ValueError: the form is not outer_product, or the target is `down`, for which v_a and a have different
                widths.
        """
        if not isinstance(modulation, OuterProductModulation) or modulation.reads_ffn:
            raise ValueError(
                "v_a and v_b are defined only for --np-form outer_product and the targets gate, up and fc1 "
                f"(got {type(modulation).__name__} on {modulation.target})"
            )
        self._modulation = modulation
        self._attention_output = attention_output

    def reconstruction_error(self) -> torch.Tensor:
        """Returns each sequence's mean squared error between v_a, generated from a, and the attention output a; [b].

        The mean is taken over the sequence's tokens, the NP components and the hidden dimension.
        """
        squares = self._a_squares - 2 * self._products + self._attention_squares
        return squares.mean((0, 2)) / self._attention_output.size(-1)

    def attention_square(self) -> torch.Tensor:
        """Returns, for each sequence, the mean of a^2 over its tokens and over the hidden dimension, [b]."""
        return self._attention_squares.mean((0, 2)) / self._attention_output.size(-1)

    def similarity(self) -> torch.Tensor:
        """Returns the cosine similarity of `v_a` and the attention output `a`, averaged over tokens and components."""
        lengths = self._a_squares.clamp_min(_TINY).sqrt() * self._attention_squares.clamp_min(_TINY).sqrt()
        return (self._products / lengths).mean()

    def a_square(self) -> torch.Tensor:
        """Returns the mean of v_a^2 over tokens, components and h."""
        return self._a_squares.mean() / self._modulation.input_size

    def b_square(self) -> torch.Tensor:
        """Returns the mean of v_b^2 over tokens, components and f. Collective over the tensor-parallel group."""
        return self._b_squares.mean() / self._modulation.output_size

    def a_norm(self) -> torch.Tensor:
        """Returns the mean of |v_a| over tokens and components, without gradient."""
        return self._a_squares.detach().clamp_min(0).sqrt().mean()

    def b_norm(self) -> torch.Tensor:
        """Returns the mean of |v_b| over tokens and components, without gradient; collective like `b_square`."""
        return self._b_squares.detach().clamp_min(0).sqrt().mean()

    @functools.cached_property
    def _code(self) -> torch.Tensor:
        """Returns z [.., k, r] in fp32, not normalised."""
        return self._modulation.code(self._attention_output)

    @functools.cached_property
    def _a_squares(self) -> torch.Tensor:
        """|v_a|^2 [.., k]."""
        reader = _reader(self._modulation)
        return _quadratic(_extended(self._modulation, self._code), reader @ reader.mT)

    @functools.cached_property
    def _b_squares(self) -> torch.Tensor:
        """|v_b|^2 [.., k]."""
        writer = _by_component(self._modulation, self._modulation.W_b_up)
        return _quadratic(self._code, _sum_over_ranks(self._modulation, writer @ writer.mT))

    @functools.cached_property
    def _products(self) -> torch.Tensor:
        """v_a . a [.., k]."""
        settings = self._modulation.settings
        read = self._modulation.read(self._attention_output)
        found = (self._code * self._modulation.by_component(read)).sum(-1) * self._modulation.rank**-0.5
        return found + read[..., self._modulation.total_rank :] if settings.has_affine else found

    @functools.cached_property
    def _attention_squares(self) -> torch.Tensor:
        """|a|^2 [.., 1]."""
        return self._attention_output.float().square().sum(-1, keepdim=True)


def factor_norm(modulation: Modulation) -> torch.Tensor:
    """Returns the sum of the Frobenius norms of a target's factors, each taken over all its shards; differentiable.

    For low_rank this is |A|_F + |B|_F (for `down` also |A_in|_F), the regularization loss in
    docs/design/npt_equivalence.md.
    Collective over the tensor-parallel group.
    """
    norms = []
    for name, factor in modulation.named_parameters():
        square = factor.float().square().sum()
        if name in modulation.split_dims:
            square = _sum_over_ranks(modulation, square)
        norms.append(square.clamp_min(_TINY).sqrt())
    return torch.stack(norms).sum()


@torch.no_grad()
def delta_norms(
    modulation: Modulation,
    attention_output: torch.Tensor,
    x: torch.Tensor | None = None,
    layer: Any = None,
    hidden_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the Frobenius norm of every token's applied delta. Collective over the tensor-parallel group.

    Args:
        modulation: the factors of one target, in any form.
        attention_output: a, [s, b, h] ([s/t, b, h] with sequence parallelism).
        x: the input of `down`, as in `Modulation.coefficients`. Required only if the target is `down` and the form is
            key_value, or outer_product with `np_normalize`; these deltas depend on x.
        layer: the transformer layer. Required only for key_value.
        hidden_states: h, the input of the MLP's norm, [s, b, h] ([s/t, b, h] with sequence parallelism). Required
            only for key_value on targets other than `down`.

    Returns:
        [s, b] ([s/t, b] with sequence parallelism), fp32.

    Raises:
        ValueError: x is required but missing.
    """
    if isinstance(modulation, KeyValueModulation):
        if modulation.reads_ffn:
            return _key_value_down_norms(modulation, attention_output, x)
        assert hidden_states is not None, "the gain depends on h"
        return _key_value_norms(modulation, attention_output, layer, hidden_states)
    if isinstance(modulation, LowRankModulation):
        reader = modulation.A_in if modulation.reads_ffn else modulation.A
        of_inputs = _gram(modulation, reader.float().t(), modulation.reads_ffn)
        of_outputs = _gram(modulation, modulation.B.float(), not modulation.reads_ffn)
        code = torch.tanh(attention_output @ modulation.A).float()
        squares = ((code @ (of_inputs * of_outputs)) * code).sum(-1)
        return squares.clamp_min(0).sqrt() * modulation.settings.np_scale
    assert isinstance(modulation, OuterProductModulation)
    return _outer_product_norms(modulation, attention_output, x)


def _outer_product_norms(
    modulation: OuterProductModulation, attention_output: torch.Tensor, x: torch.Tensor | None
) -> torch.Tensor:
    settings = modulation.settings
    code = modulation.code(attention_output)
    if settings.np_normalize:
        code = code * modulation.inverse_rms(code).unsqueeze(-1)
    reader, writer = _reader(modulation), _by_component(modulation, modulation.W_b_up)
    of_a = _gram(modulation, reader.flatten(0, 1), modulation.reads_ffn)
    of_b = _gram(modulation, writer.flatten(0, 1), not modulation.reads_ffn)
    products = _cross(_extended(modulation, code), of_a) * _cross(code, of_b)
    if modulation.divides_by_read:
        inverse = modulation.inverse_rms(modulation.by_component(modulation.read_whole(_required(x))))
        products = products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    else:
        products = products / modulation.input_size
    factor = settings.np_scale / math.sqrt(modulation.total_rank)
    return products.sum((-2, -1)).clamp_min(0).sqrt() * factor


def _key_value_down_norms(
    modulation: KeyValueModulation, attention_output: torch.Tensor, x: torch.Tensor | None
) -> torch.Tensor:
    squared = modulation.read_whole(_required(x)).squeeze(-1)
    values = modulation.coefficients(attention_output, attention_output) @ modulation.B
    return values.float().norm(dim=-1) * squared.clamp_min(_TINY).rsqrt()


def _key_value_norms(
    modulation: KeyValueModulation, attention_output: torch.Tensor, layer: Any, hidden_states: torch.Tensor
) -> torch.Tensor:
    settings, config = modulation.settings, modulation.config
    gain, inverse_rms = norm_gain(hidden_states, attention_output, settings, config)
    normed = layer.pre_mlp_layernorm(hidden_states).float()
    change, norm = gain - 1, layer.pre_mlp_layernorm
    written = (modulation.code(attention_output, inverse_rms) @ modulation.B * full_weight(norm)).float()
    bias = norm_bias(norm)
    if bias is not None:
        written = written - change * bias.float()
    of_outputs = _gram(
        modulation, layer.mlp.linear_fc1.weight.float().t(), True
    )  # W^T W; every rank has some rows of W
    squares = (written @ of_outputs * (written + 2 * change * normed)).sum(-1)
    key = normed.square().sum(-1).clamp_min(_TINY)
    squares = squares / key + (change.squeeze(-1) * weight_norm(modulation, layer.mlp)).square()
    return squares.clamp_min(0).sqrt()


def _required(x: torch.Tensor | None) -> torch.Tensor:
    if x is None:
        raise ValueError("delta_norms: pass x, because the delta of `down` depends on its input")
    return x


@torch.no_grad()
def weight_norm(modulation: Modulation, mlp: Any) -> torch.Tensor:
    """Returns |W|_F of the whole base weight of a target. Collective over the tensor-parallel group.

    Args:
        modulation: the factors of the target.
        mlp: the layer's MLP; gate and up are the two halves of its fc1.
    """
    square = target_weight(modulation.target, mlp).float().square().sum()
    dist.all_reduce(square, group=modulation.groups.tp)
    return square.sqrt()


def target_weight(target: str, mlp: Any) -> torch.Tensor:
    """Returns this rank's part of a target's base weight, [output, input] with f divided by t."""
    if target in ("gate", "up"):
        return mlp.linear_fc1.weight.chunk(2)[target == "up"]
    return (mlp.linear_fc2 if target == "down" else mlp.linear_fc1).weight


def _by_component(modulation: Modulation, factor: torch.Tensor) -> torch.Tensor:
    """Reshapes [k r, n] to [k, r, n], in fp32."""
    return factor.float().unflatten(0, (modulation.settings.num_np_components, modulation.rank))


def _reader(modulation: OuterProductModulation) -> torch.Tensor:
    """Returns [W_a_up ; c_a], [k, r + 1, input] (r rows without c_a), in fp32."""
    rows = _by_component(modulation, modulation.W_a_up)
    return (
        torch.cat([rows, modulation.c_a.float().unsqueeze(1)], 1) if modulation.settings.has_affine else rows
    )


def _extended(modulation: OuterProductModulation, code: torch.Tensor) -> torch.Tensor:
    """Returns [z / sqrt(r) ; 1], [.., k, r + 1]; its product with `_reader` is v_a."""
    code = code * modulation.rank**-0.5
    return torch.nn.functional.pad(code, (0, 1), value=1.0) if modulation.settings.has_affine else code


def _quadratic(code: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Computes z G z per component, [.., k, r] and [k, r, r] -> [.., k]."""
    return (torch.einsum("...ki,kij->...kj", code, gram) * code).sum(-1)


def _cross(code: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Computes z_k G_kl z_l for every pair of components, [.., k, r] and [k r, k r] -> [.., k, k]."""
    blocks = gram.unflatten(0, code.shape[-2:]).unflatten(-1, code.shape[-2:])
    return torch.einsum("...ki,kilj,...lj->...kl", code, blocks, code)


def _gram(modulation: Modulation, rows: torch.Tensor, is_split: bool) -> torch.Tensor:
    """Returns the Gram matrix of the rows, `rows @ rows.T`.

    If each rank holds a part of every row (`is_split`), the result is the sum over the tensor-parallel ranks, through
    which no gradient flows.
    """
    gram = rows @ rows.t()
    if is_split:
        dist.all_reduce(gram, group=modulation.groups.tp)
    return gram


def _sum_over_ranks(modulation: Modulation, part: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the tensor-parallel ranks' parts, differentiable."""
    # Without sequence parallelism, every rank computes the same loss from the sum, so the gradient of each part
    # equals the gradient of the sum. With sequence parallelism, the ranks' losses differ, so the gradients of all
    # ranks are added up.
    group = modulation.groups.tp
    if group.size() == 1:
        return part
    whole = reduce_from_tensor_model_parallel_region(part, group=group)
    if modulation.config.sequence_parallel:
        whole = copy_to_tensor_model_parallel_region(whole, group=group)
    return whole
