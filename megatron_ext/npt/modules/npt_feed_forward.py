"""The feed-forward module of an NPT layer: the base MLP, with weights that the attention output `a` changes.

    MLP*(n) = (W_fc2 + delta_down) act((W_fc1 + [delta_gate ; delta_up]) n)       see `modulation` and `key_value`

The MLP's input is n = LN2(h), the normed input of the layer, without a: the attention output acts only through the
weights. Whether a is added to the layer's output depends on `np_residual`:

    drop    output = h + MLP*(n)
    keep    output = h + a + MLP*(n)

key_value computes its delta of fc1 by changing fc1's input. The norm LN2 and the weights W are the base layer's. Gate
and up are the two halves of fc1, as in megatron-core; an MLP without a gate has only fc1. Shapes: h, a, n [s, b, h]
([s/t, b, h] with sequence parallelism); tensors inside the MLP [s, b, f/t].
Source: docs/design/npt_equivalence.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.auxiliary_inputs import LayerInputs
from megatron_ext.models.ops.add_product import add_product
from megatron_ext.npt.modules.key_value import KeyValueModulation
from megatron_ext.npt.modules.layer_step import LayerStep
from megatron_ext.npt.modules.modulation import LowRankModulation, Modulation, OuterProductModulation
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig

FORMS: dict[str, type[Modulation]] = {
    "low_rank": LowRankModulation,
    "outer_product": OuterProductModulation,
    "key_value": KeyValueModulation,
}
"""Maps each value of `np_form` to its class."""


class NPFeedForward(MegatronModule):
    """The feed-forward module of one NPT layer: one `Modulation` for each weight matrix that gets a delta (target)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        *,
        settings: NPTModuleConfig,
    ) -> None:
        """Args:
        config: megatron-core's transformer configuration.
        layer_number: number of the layer in the whole model, from 1.
        pg_collection: the process groups.
        settings: NPT's configuration.
        """
        super().__init__(config)
        self.settings = settings
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.context_group = pg_collection.cp
        self.active = True
        """Whether the layer uses this module; if False, it runs as the base layer, on megatron-core's own code path."""
        self.step: LayerStep | None = None
        """Chooses the layer's inputs and attaches its losses in the current training step; None outside training."""
        for target in settings.targets:
            rank = settings.rank(layer_number - 1, target, config.num_layers)
            self.add_module(target, FORMS[settings.np_form](config, pg_collection, settings, target, rank))

    @property
    def modulations(self) -> dict[str, Modulation]:
        """Maps each target to its `Modulation`."""
        return {target: self.get_submodule(target) for target in self.settings.targets}

    def forward(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
        layer_inputs: LayerInputs | None,
    ) -> torch.Tensor:
        """Computes the layer's output, [s, b, h].

        Args:
            layer: the transformer layer, whose norms and MLP are used.
            hidden_states: h, the layer's input, [s, b, h].
            attend: function that takes attention's input and returns `a`, the attention output after bias and dropout.
            layer_inputs: tensors that accompany the hidden states, such as the teacher's input to this layer.
        """
        step = self.step
        attention_input = mlp_input = hidden_states
        if step is not None and layer_inputs is not None:
            attention_input, mlp_input = step.inputs(hidden_states, layer_inputs)
        attention_output = attend(attention_input)
        mlp_output = self.mlp_output(layer, mlp_input, attention_output)
        keeps = self.settings.np_residual == "keep"
        residual = mlp_input + attention_output if keeps else mlp_input
        add = layer.mlp_bda(layer.training, self.config.bias_dropout_fusion)
        output = add((mlp_output, None), residual, layer.hidden_dropout)
        if step is None:
            return output
        return step.attach(self, layer, (hidden_states, mlp_input), attention_output, mlp_output, output)

    def mlp_output(
        self, layer: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        """Computes MLP*(LN2(h)) with biases, [s, b, h]; recomputes it in the backward pass if the layer's
        configuration requires that.

        Args:
            layer: the transformer layer, whose norm and MLP are used.
            hidden_states: h, the norm's input, [s, b, h].
            attention_output: a, [s, b, h].
        """
        for modulation in self.modulations.values():
            modulation()  # this call only waits for the factors; they are used directly, not through a call
        fc1 = self.modulations.get("fc1")
        if isinstance(fc1, KeyValueModulation):
            normed = fc1.fc1_input(layer.pre_mlp_layernorm, hidden_states, attention_output)
        else:
            normed = layer.pre_mlp_layernorm(hidden_states)
        if not layer.recompute_mlp:
            return self.modulated_mlp(layer.mlp, normed, attention_output)
        if torch.is_grad_enabled() and not (normed.requires_grad or attention_output.requires_grad):
            # A recomputed function gets gradients only if an input requires them, but here only the parameters do.
            normed = normed.detach().requires_grad_()
        run = partial(self.modulated_mlp, layer.mlp)
        return tensor_parallel.checkpoint(run, False, normed, attention_output)

    def modulated_mlp(self, mlp: Any, normed: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Computes MLP*(n) with biases, [s, b, h].

        Args:
            mlp: the base MLP.
            normed: n, the MLP's normed input, [s, b, h]; for key_value, the changed input of fc1.
            attention_output: a, [s, b, h].
        """
        inner, bias = mlp.linear_fc1(normed)
        if not self.settings.has_gain:
            inner = self._add_to_fc1(inner, normed, attention_output)
        if bias is not None:
            inner = inner + bias
        activated = mlp.activation_func(inner)
        output, bias = mlp.linear_fc2(activated)
        if bias is not None:
            output = output + bias
        down = self.modulations.get("down")
        if down is not None:
            output = add_product(output, down.coefficients(activated, attention_output), down.output_factor)
        return output

    def _add_to_fc1(
        self, inner: torch.Tensor, normed: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        """Adds u B of gate and up (or of fc1) to W_fc1 n, [s, b, 2 f/t] (or f/t); `up` is the second half."""
        parts = [modulation for target, modulation in self.modulations.items() if target != "down"]
        coefficients = self._for_all_ranks([part.coefficients(normed, attention_output) for part in parts])
        for index, (part, u) in enumerate(zip(parts, coefficients, strict=True)):
            factor = part.output_factor
            inner = add_product(inner, u, factor, start=index * factor.size(1))
        return inner

    def _for_all_ranks(self, coefficients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns every u for the full sequence, [s, b, k r], on every rank; its gradient is summed over the ranks."""
        # u, instead of a and n, enters the tensor-parallel region here. As a result, the gradients of the replicated
        # factors (which multiply a and n) are complete on every rank.
        if self.tp_group.size() == 1:
            return coefficients
        joined = torch.cat(coefficients, dim=-1)
        if self.config.sequence_parallel:
            joined = gather_from_sequence_parallel_region(joined, group=self.tp_group)
        else:
            joined = copy_to_tensor_model_parallel_region(joined, group=self.tp_group)
        return list(joined.split([u.size(-1) for u in coefficients], dim=-1))
