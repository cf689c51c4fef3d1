"""The delta of one weight matrix W: an update of W that the attention output `a` generates for each token.

The base layer computes y = W x. With the delta, which is applied in factored form, the layer computes

    y = W x + u B         u: r values per token and component

The delta itself, [output, input] per token, is never built.

Two forms (`--np-form`) compute u as follows; `down` is the MLP's second weight matrix, whose input x has width f:

    low_rank        delta = scale * B diag(tanh(a A)) A^T
                    u = scale * (x A) * tanh(a A)                                  A: [h, r], B: [r, output]
                    `down` uses A_in: [f, r] instead of A in `x A`

    outer_product   delta = scale / sqrt(k r) * sum_k v_b (x) v_a
                    z = a W_down / rms(a W_down)                                   W_down: [h, r]
                    v_a = (z W_a_up / sqrt(r) + c_a) / sqrt(input)                 W_a_up: [r, input], c_a: [input]
                    v_b = z W_b_up                                                 W_b_up: [r, output]
                    u = scale / sqrt(k r) * (v_a . x) * z
                    `down` divides v_a by rms(W_a_up x) instead of sqrt(input)

The third form is in `key_value`.

A delta is the sum of k components, whose factors are concatenated: A is [h, k r], W_a_up [k r, input], c_a [k, input],
B and W_b_up [k r, output]. For low_rank, k components of rank r equal one component of rank k r.

Why outer_product is normalised and low_rank is not: in low_rank, tanh bounds the influence of a. In outer_product, the
constants 1 / sqrt(..) keep a sum of n terms from growing with n. Adam changes every weight in a sum by a step of the
same size, so without these constants the effect of a step would grow with r, k and the width. Dividing z by its root
mean square keeps v_b (x) v_a from growing with |a|^2. The input of `down`, unlike that of `gate` and `up`, is not the
output of a norm; dividing by rms(W_a_up x) makes up for that. `np_normalize=False` omits both divisions by an rms.
Source: docs/design/npt_sequential.md (outer_product, there without c_a and normalisation) and
docs/design/npt_equivalence.md (low_rank).

Tensor parallelism: for `gate`, `up` and `fc1` the factors that are multiplied by a or x are replicated, and B and
W_b_up are split over f like the weight. For `down`, the factors that are multiplied by x are split over f, and their
products are summed over the ranks; B and W_b_up are replicated.
"""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform import process_groups

EPS = 1e-6
"""Added to a mean square before a division, so that an attention output of zero gives a delta of zero."""


class Modulation(MegatronModule):
    """The factors of one target (a weight matrix that gets a delta), for all components; each form has a subclass."""

    output_name: str
    """Name of the factor by which u is multiplied, B or W_b_up."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        settings: NPTModuleConfig,
        target: str,
        rank: int,
    ) -> None:
        """Args:
        config: megatron-core's transformer configuration.
        groups: the process groups; factors with a dimension f are split over the tensor-parallel group.
        settings: form, rank and initial values.
        target: `gate`, `up`, `down` or `fc1`.
        rank: rank r of one component.
        """
        super().__init__(config)
        self.rank = rank
        self.total_rank = settings.num_np_components * rank
        """Rank k r of all components together."""
        self.groups = groups
        self.settings = settings
        self.target = target
        self.reads_ffn = target == "down"
        widths = (config.hidden_size, config.ffn_hidden_size)
        self.output_size, self.input_size = widths if self.reads_ffn else widths[::-1]
        self.split_dims: dict[str, int] = {}
        """Maps each split factor to the dimension split over the tensor-parallel ranks; other factors are
        replicated.
        """
        self.build()

    def build(self) -> None:
        """Creates the factors as parameters."""
        raise TypeError(f"{type(self).__name__} must implement build()")

    def forward(self) -> None:
        """Computes nothing; must be called before the factors are used.

        With --overlap-param-gather the engine waits for a module's parameters before the module is called.
        """

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the target's input x by the factors for x; for `down`, each rank gets a partial sum.

        Args:
            x: [s, b, input] ([s/t, b, h] with sequence parallelism, [s, b, f/t] for `down`).

        Returns:
            [s, b, k r], or [s, b, k r + k] with c_a.
        """
        raise TypeError(f"{type(self).__name__} must implement read()")

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Computes u [.., k r] from the complete products of `read` and the attention output [.., h]."""
        raise TypeError(f"{type(self).__name__} must implement combine()")

    def coefficients(self, x: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Computes u, [s, b, k r] ([s/t, b, k r] with sequence parallelism).

        Args:
            x: the target's input, as in `read`.
            attention_output: a, [s, b, h] ([s/t, b, h] with sequence parallelism).
        """
        return self.combine(self.read_whole(x), attention_output)

    def read_whole(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the complete products of `read`, summed over the ranks for `down`; [s/t, b, ..] with sequence
        parallelism.
        """
        products = self.read(x)
        if not self.reads_ffn or self.groups.tp.size() == 1:
            return products
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(products, group=self.groups.tp)
        return reduce_from_tensor_model_parallel_region(products, group=self.groups.tp)

    @property
    def output_factor(self) -> torch.Tensor:
        """This rank's part of B or W_b_up, [k r, output(/t)]."""
        return getattr(self, self.output_name)

    def add_factor(self, name: str, shape: tuple[int, int], std: float, *, of_ffn: int | None = None) -> None:
        """Creates a factor as a parameter.

        Args:
            name: name of the parameter, as in the formulas at the top of this file.
            shape: shape of the whole factor.
            std: standard deviation of the initial values; 0 for a factor of zeros.
            of_ffn: index of the dimension to split over the tensor-parallel ranks, whose size is f; None to replicate
                the factor.
        """
        local = list(shape)
        if of_ffn is not None:
            local[of_ffn] //= self.groups.tp.size()
            self.split_dims[name] = of_ffn
        values = torch.zeros(local, dtype=self.config.params_dtype, device=process_groups.device())
        parameter = torch.nn.Parameter(values)
        parameter.init_std = std  # type: ignore[attr-defined]
        if of_ffn is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=of_ffn, stride=1)
        else:
            # With sequence parallelism, a rank's gradient of a replicated factor covers only this rank's tokens; with
            # this attribute, the engine sums the gradient over the tensor-parallel ranks.
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def add_output_factor(self, scale: float) -> None:
        """Creates the output factor, B or W_b_up.

        Args:
            scale: standard deviation that would give a delta of unit size; it is multiplied by `np_init_scale`.
        """
        shape = (self.total_rank, self.output_size)
        self.add_factor(self.output_name, shape, self.output_std(scale), of_ffn=None if self.reads_ffn else 1)

    def output_std(self, scale: float) -> float:
        """Returns the standard deviation of the output factor's initial values; for `scale`, see
        `add_output_factor`.
        """
        settings = self.settings
        return scale * settings.np_init_scale if settings.np_init_strategy == "improved" else 0.0

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the factors as sharded tensors named `{prefix}{name}`, which can be loaded at any tensor-parallel
        size.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_dims,
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )


class LowRankModulation(Modulation):
    """Form low_rank: delta = scale * B diag(tanh(a A)) A^T; see the formulas at the top of this file."""

    output_name = "B"

    def build(self) -> None:
        """Creates the parameters A, B and, for `down`, A_in."""
        hidden, rank = self.config.hidden_size, self.total_rank
        self.add_factor("A", (hidden, rank), hidden**-0.5)
        if self.reads_ffn:
            self.add_factor("A_in", (self.input_size, rank), self.input_size**-0.5, of_ffn=0)
        self.add_output_factor(rank**-0.5)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x A, [.., k r]."""
        return x @ (self.A_in if self.reads_ffn else self.A)

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Returns scale * (x A) * tanh(a A), [.., k r]."""
        return products * torch.tanh(attention_output @ self.A) * self.settings.np_scale


class OuterProductModulation(Modulation):
    """Form outer_product: delta = a sum of outer products v_b (x) v_a; see the formulas at the top of this file."""

    output_name = "W_b_up"

    def build(self) -> None:
        """Creates the parameters W_down, W_a_up, c_a and W_b_up."""
        settings, rank = self.settings, self.total_rank
        of_ffn = 1 if self.reads_ffn else None
        self.add_factor("W_down", (self.config.hidden_size, rank), self.config.hidden_size**-0.5)
        self.add_factor("W_a_up", (rank, self.input_size), 1.0, of_ffn=of_ffn)
        if settings.has_affine:
            self.add_factor("c_a", (settings.num_np_components, self.input_size), 0.0, of_ffn=of_ffn)
        self.add_output_factor(1.0)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [W_a_up x ; c_a . x], [.., k r + k], or [.., k r] without c_a."""
        # Compute one product instead of two, because reading x twice costs more than concatenating the factors.
        reader = torch.cat([self.W_a_up, self.c_a]) if self.settings.has_affine else self.W_a_up
        return x @ reader.t()

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Returns scale / sqrt(k r) * (v_a . x) * z, [.., k r]; computed in fp32."""
        settings = self.settings
        # z itself is not divided by its root mean square. It occurs twice in u (in v_a and as a factor), so the
        # scalar s is multiplied by 1 / rms(z) twice: before and after adding the term of c_a, which does not depend
        # on z.
        z, read = self.code(attention_output), self.by_component(products)
        s = (z * read).sum(-1) * self.rank**-0.5
        inverse_rms = self.inverse_rms(z) if settings.np_normalize else None
        if inverse_rms is not None:
            s = s * inverse_rms
        if settings.has_affine:
            s = s + products[..., self.total_rank :].float()
        if inverse_rms is not None:
            s = s * inverse_rms
        s = s * (self.inverse_rms(read) if self.divides_by_read else self.input_size**-0.5)
        s = s * (settings.np_scale / math.sqrt(self.total_rank))
        return (s.unsqueeze(-1) * z).flatten(-2).to(products.dtype)

    @property
    def divides_by_read(self) -> bool:
        """Whether v_a is divided by rms(W_a_up x) instead of sqrt(input)."""
        return self.reads_ffn and self.settings.np_normalize

    def code(self, attention_output: torch.Tensor) -> torch.Tensor:
        """Returns z [.., k, r] in fp32, not divided by its root mean square."""
        return self.by_component(attention_output @ self.W_down)

    def by_component(self, values: torch.Tensor) -> torch.Tensor:
        """Reshapes the first k r values of the last dimension to [.., k, r], in fp32."""
        settings = self.settings
        values = values[..., : self.total_rank].float()
        return values.unflatten(-1, (settings.num_np_components, self.rank))

    @staticmethod
    def inverse_rms(values: torch.Tensor) -> torch.Tensor:
        """Returns 1 / (root mean square of the values) over the last dimension."""
        return torch.rsqrt(values.square().mean(-1) + EPS)
