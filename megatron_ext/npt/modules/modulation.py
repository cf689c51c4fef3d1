"""The delta of one weight matrix, generated from the attention output token by token and applied factored.

The base layer computes y = W x. With the delta, `u` has r values a token and component, and

    y = W x + u B                            the delta itself, [output, input] for every token, is never built

    low_rank        delta = scale * B diag(tanh(a A)) A^T
                    u = scale * (x A) * tanh(a A)                                  A: [h, r], B: [r, output]
                    `down` reads its x, of width f, with a factor of its own, A_in: [f, r]

    outer_product   delta = scale / sqrt(k r) * sum_k v_b (x) v_a
                    z = a W_down / rms(a W_down)                                   W_down: [h, r]
                    v_a = (z W_a_up / sqrt(r) + c_a) / sqrt(input)                 W_a_up: [r, input], c_a: [input]
                    v_b = z W_b_up                                                 W_b_up: [r, output]
                    u = scale / sqrt(k r) * (v_a . x) * z
                    `down` divides v_a by rms(W_a_up x) in the place of sqrt(input)

k components lie side by side in one factor: A is [h, k r], W_a_up [k r, input], c_a [k, input], B and W_b_up
[k r, output]. For low_rank that is the same as one component of rank k r.

Why outer_product has normalisations, and low_rank none: there tanh bounds what a does. Here the constants make a sum of
n terms count as sqrt(n) of them: Adam moves each weight of a sum by the same step, in one direction, so without them a
step's effect grows with r, k and the width. Dividing z by its root mean square keeps v_b (x) v_a from growing with
|a|^2; and the input of `down` is not normalised as that of `gate` and `up` is, so it is measured by what W_a_up reads
from it. `np_normalize=False` leaves the last two out.
Source: documents 000, 001 (outer_product; without c_a and normalisation) and 002 (low_rank).

Tensor parallel, s/t rows under sequence parallel: factors that read a and the layer's norm are replicated; B and W_b_up
are split over f as the weight is. For `down`, what reads x is split over f and its products are summed, B and W_b_up
are replicated.
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
"""Added to mean squares before division: an attention output of zero gives a delta of zero."""


class Modulation(MegatronModule):
    """Factors of one target, all components; the forms are subclasses."""

    output_name: str
    """The factor that u multiplies."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        settings: NPTModuleConfig,
        target: str,
    ) -> None:
        """Args:
        config: the engine's configuration.
        groups: the tensor-parallel group splits what reads or writes f.
        settings: form, rank and initial values.
        target: `gate`, `up`, `down` or `fc1`.
        """
        super().__init__(config)
        self.groups = groups
        self.settings = settings
        self.target = target
        self.reads_ffn = target == "down"
        widths = (config.hidden_size, config.ffn_hidden_size)
        self.output_size, self.input_size = widths if self.reads_ffn else widths[::-1]
        self.split_dims: dict[str, int] = {}
        """Dimension of each factor that is split over the tensor-parallel ranks; the other factors are replicated."""
        self.build()

    def build(self) -> None:
        """Makes the factors."""
        raise TypeError(f"{type(self).__name__} must say which factors it has")

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What u needs of the layer's input x: r-sized products, the local part of a sum where x is split.

        Args:
            x: [s, b, input] ([s/t, b, h] under sequence parallel, [s, b, f/t] for `down`).
        """
        raise TypeError(f"{type(self).__name__} must say what it reads")

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """u [.., k r] from the products of `read`, whole, and the attention output [.., h]."""
        raise TypeError(f"{type(self).__name__} must say how it combines")

    def coefficients(self, x: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """u [s, b, k r] ([s/t, b, k r] under sequence parallel) for the input x of `read` and a, [s(/t), b, h]."""
        return self.combine(self.read_whole(x), attention_output)

    def read_whole(self, x: torch.Tensor) -> torch.Tensor:
        """`read`, summed over the ranks where x is split; this rank's rows [s/t, b, ..] under sequence parallel."""
        products = self.read(x)
        if not self.reads_ffn or self.groups.tp.size() == 1:
            return products
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(products, group=self.groups.tp)
        return reduce_from_tensor_model_parallel_region(products, group=self.groups.tp)

    @property
    def output_factor(self) -> torch.Tensor:
        """The local part of B or W_b_up, [k r, output(/t)]."""
        return getattr(self, self.output_name)

    def add_factor(self, name: str, shape: tuple[int, int], std: float, *, of_ffn: int | None = None) -> None:
        """Registers a factor.

        Args:
            name: as in the formulas; the parameter's name.
            shape: of the whole factor.
            std: standard deviation of the initial values, see `models.init`; 0 leaves zeros.
            of_ffn: the dimension that is f, which the tensor-parallel ranks split; None for a replicated factor.
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
            # It sees this rank's rows only: the engine sums its gradient over the tensor-parallel ranks.
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def add_output_factor(self, scale: float) -> None:
        """Registers B or W_b_up; `scale` makes the delta's size `np_init_scale` under the strategy improved."""
        settings = self.settings
        std = scale * settings.np_init_scale if settings.np_init_strategy == "improved" else 0.0
        shape = (settings.total_rank, self.output_size)
        self.add_factor(self.output_name, shape, std, of_ffn=None if self.reads_ffn else 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The factors under `{prefix}{name}`, at any tensor-parallel size."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_dims,
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=self.groups.dp_cp,
        )


class LowRankModulation(Modulation):
    """B diag(tanh(a A)) A^T; see the formulas at the top of this file."""

    output_name = "B"

    def build(self) -> None:
        """A, A_in for `down`, and B."""
        hidden, rank = self.config.hidden_size, self.settings.total_rank
        self.add_factor("A", (hidden, rank), hidden**-0.5)
        if self.reads_ffn:
            self.add_factor("A_in", (self.input_size, rank), self.input_size**-0.5, of_ffn=0)
        self.add_output_factor(rank**-0.5)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """x A, [.., k r]."""
        return x @ (self.A_in if self.reads_ffn else self.A)

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """(x A) tanh(a A), scaled: [.., k r]."""
        return products * torch.tanh(attention_output @ self.A) * self.settings.np_scale


class OuterProductModulation(Modulation):
    """Sum of v_b (x) v_a; see the formulas at the top of this file."""

    output_name = "W_b_up"

    def build(self) -> None:
        """W_down, W_a_up, c_a and W_b_up."""
        settings, rank = self.settings, self.settings.total_rank
        of_ffn = 1 if self.reads_ffn else None
        self.add_factor("W_down", (self.config.hidden_size, rank), self.config.hidden_size**-0.5)
        self.add_factor("W_a_up", (rank, self.input_size), 1.0, of_ffn=of_ffn)
        if settings.has_affine:
            self.add_factor("c_a", (settings.num_np_components, self.input_size), 0.0, of_ffn=of_ffn)
        self.add_output_factor(1.0)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """[W_a_up x ; c_a . x], [.., k r] or [.., k r + k]; in one product, as x is much larger than the factors."""
        reader = torch.cat([self.W_a_up, self.c_a]) if self.settings.has_affine else self.W_a_up
        return x @ reader.t()

    def combine(self, products: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """(v_a . x) z, scaled: [.., k r]. In fp32, as sums of products should be.

        With z = a W_down still to be divided by its root mean square: both of its divisions are in the factor of z.
        """
        settings = self.settings
        z, read = self.code(attention_output), self.by_component(products)
        s = (z * read).sum(-1) * settings.np_rank**-0.5
        inverse_rms = self.inverse_rms(z) if settings.np_normalize else None
        if inverse_rms is not None:
            s = s * inverse_rms
        if settings.has_affine:
            s = s + products[..., settings.total_rank :].float()
        if inverse_rms is not None:
            s = s * inverse_rms
        s = s * (self.inverse_rms(read) if self.divides_by_read else self.input_size**-0.5)
        s = s * (settings.np_scale / math.sqrt(settings.total_rank))
        return (s.unsqueeze(-1) * z).flatten(-2).to(products.dtype)

    @property
    def divides_by_read(self) -> bool:
        """True where v_a is divided by rms(W_a_up x), False: by sqrt(input)."""
        return self.reads_ffn and self.settings.np_normalize

    def code(self, attention_output: torch.Tensor) -> torch.Tensor:
        """z [.., k, r] in fp32, not yet divided by its root mean square."""
        return self.by_component(attention_output @ self.W_down)

    def by_component(self, values: torch.Tensor) -> torch.Tensor:
        """The first k r of the last dimension as [.., k, r] in fp32."""
        settings = self.settings
        values = values[..., : settings.total_rank].float()
        return values.unflatten(-1, (settings.num_np_components, settings.np_rank))

    @staticmethod
    def inverse_rms(values: torch.Tensor) -> torch.Tensor:
        """1 / root mean square over the last dimension."""
        return torch.rsqrt(values.square().mean(-1) + EPS)


FORMS: dict[str, type[Modulation]] = {
    "low_rank": LowRankModulation,
    "outer_product": OuterProductModulation,
}
"""`np_form` -> class."""
