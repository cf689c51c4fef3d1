"""The transformer layer that all model families share: megatron-core's layer with three slots for their modules.

With the slots `before_layer`, `feed_forward` and `after_mlp` the layer computes:

    x      <- before_layer(x, streams)
    x      <- x + Attention(LN1(x))
    x      <- x + MLP(LN2(x))               or, instead of these two lines, x <- feed_forward(layer, x, attend, streams)
    output <- after_mlp(x, streams)         with a layer scalar c: output <- c * after_mlp(x, streams)

With sandwich norms, Attention(...) and MLP(...) are each normalized before the sums. Laurel adds a path beside the
attention. With AltUp, all lines except the last run on one of several residual streams; see `gemma3n`.

`streams` is a `LayerInputs`, the auxiliary streams of this layer. A family fills a slot through the layer's spec. An
empty slot (`IdentityOp`) is not called; with all three empty the layer runs megatron-core's own code path.
Shapes: hidden states [s, b, h] ([s/t, b, h] under sequence parallel).
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor

from megatron_ext.models.attention.extended_self_attention import ExtendedSelfAttention
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs, LayerInputs
from megatron_ext.models.gemma3n.laurel import with_laurel
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.platform import process_groups

SLOTS = ("before_layer", "feed_forward", "after_mlp")


@dataclass
class ExtendedLayerSubmodules(TransformerLayerSubmodules):
    """megatron-core's submodules, and slots for modules with the arguments `config`, `layer_number`,
    `pg_collection`.
    """

    before_layer: ModuleSpec | type = IdentityOp
    """`forward(hidden_states, streams) -> hidden_states`, called before the attention's norm."""

    feed_forward: ModuleSpec | type = IdentityOp
    """`forward(layer, hidden_states, attend, streams) -> hidden_states`, replaces attention and MLP.

    It can use the layer's norms and MLP, and `attend(hidden_states)`, the layer's method with all other arguments
    bound. While the module's attribute `active` is False, the slot counts as empty.
    """

    after_mlp: ModuleSpec | type = IdentityOp
    """`forward(hidden_states, streams) -> hidden_states`, called on the layer's output."""

    post_attention_layernorm: ModuleSpec | type = IdentityOp
    """Sandwich norm, applied to the attention's output including its bias."""

    post_mlp_layernorm: ModuleSpec | type = IdentityOp
    """Sandwich norm, applied to the MLP's output including its bias."""

    laurel: ModuleSpec | type = IdentityOp
    """Laurel's low-rank path; takes `config=`, `eps=`."""

    altup: ModuleSpec | type = IdentityOp
    """AltUp's prediction and correction of the residual streams; takes `config=`, `eps=`."""


class NormInLinear(torch.nn.Module):
    """Holds the weights of a norm that Transformer Engine's linear layer computes; returns its input unchanged.

    In this way, parameters keep the names that they have with a separate norm, in checkpoints and everywhere else.
    """

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            parameter = linear._parameters.pop(f"layer_norm_{name}", None)
            if parameter is not None:
                self.register_parameter(name, parameter)
                # Transformer Engine reads this attribute. Unlike an entry of `_parameters`, the attribute does not
                # appear in lists of parameters.
                linear.__dict__[f"layer_norm_{name}"] = parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def changed(
    change: Callable[[torch.Tensor], torch.Tensor], add: Callable[..., BiasDropoutAdd]
) -> Callable[..., BiasDropoutAdd]:
    """Wraps the engine's bias-dropout-add `add`: `change` is applied to output plus bias, before dropout and sum."""

    def choose(*args: Any) -> BiasDropoutAdd:
        add_residual = add(*args)

        def run(
            returned: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            output, bias = returned
            whole = change(output if bias is None else output + bias)
            return add_residual((whole, None), residual, dropout)

        return run

    return choose


def with_sizes(config: TransformerConfig, sizes: Mapping[str, int]) -> TransformerConfig:
    """Returns a layer's configuration with these sizes; `config` itself if it already has them."""
    changed = {name: size for name, size in sizes.items() if getattr(config, name) != size}
    if changed:
        config = copy.copy(config)
        for name, size in changed.items():
            setattr(config, name, size)
    return config


class ExtendedTransformerLayer(TransformerLayer):
    """megatron-core's layer with the slots of `ExtendedLayerSubmodules`."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        submodules: ExtendedLayerSubmodules,
        auxiliary: AuxiliaryInputs,
        sizes: Mapping[str, int] | None = None,
        changes_outputs: str | None = None,
        residual_multiplier: float = 1.0,
        has_scalar: bool = False,
        sends_written: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(with_sizes(config, sizes or {}), *args, submodules=submodules, **kwargs)
        self.auxiliary = auxiliary
        self.changes_outputs = changes_outputs
        """See `ModelConfig.changes_outputs`."""
        self.sends_written = sends_written
        """Whether the output contains, as further rows for the next stage, the streams that layers have written."""
        self._separate_norm("input_layernorm", self.self_attention.linear_qkv)
        self._separate_norm("pre_mlp_layernorm", self.mlp.linear_fc1)
        for slot in SLOTS:
            module = build_module(
                getattr(submodules, slot),
                config=self.config,
                layer_number=self.layer_number,
                pg_collection=self.pg_collection,
            )
            setattr(self, slot, module)
        for name, adds in (("post_attention_layernorm", "self_attn_bda"), ("post_mlp_layernorm", "mlp_bda")):
            if residual_multiplier != 1.0:
                setattr(self, adds, changed(lambda output: output * residual_multiplier, getattr(self, adds)))
            norm = build_module(
                getattr(submodules, name),
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )
            if not isinstance(norm, IdentityOp):
                setattr(self, name, norm)
                setattr(self, adds, changed(norm, getattr(self, adds)))
        if changes_outputs:
            # The engine would enable gradients here even in a pass without them, so that the norms would save their
            # inputs.
            self.bias_dropout_add_exec_handler = contextlib.nullcontext
        self._add_parts_of_gemma3n(submodules)
        self.has_scalar = has_scalar
        """Whether the output is multiplied by the buffer `layer_scalar`."""
        if has_scalar:
            ones = torch.ones(1, dtype=self.config.params_dtype, device=process_groups.device())
            self.register_buffer("layer_scalar", ones)
        self.skipped = False
        """Whether the layer returns its input unchanged; see `GPTModel.run_layers`."""

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the layer.

        Args:
            hidden_states: [s, b, h].
            context: the packed auxiliary streams; see `auxiliary_inputs`.
            **kwargs: further arguments that megatron-core's block passes to every layer (mask, rotary embedding, KV
              cache, ...).

        Returns:
            The output [s, b, h], with further rows if `sends_written`, and the packed auxiliary streams for the next
            layer.
        """
        layer_inputs = self.auxiliary.open(context, hidden_states)
        if not self.skipped:
            hidden_states = self._run(hidden_states, layer_inputs, **kwargs)
        if self.sends_written:
            hidden_states = self.auxiliary.with_written(hidden_states, layer_inputs)
        return hidden_states, layer_inputs.packed

    def _run(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs, **kwargs: Any) -> torch.Tensor:
        attention = self.self_attention
        if isinstance(attention.core_attention, SDPAttention):
            attention.core_attention.take_rotary(kwargs.pop("rotary_pos_emb", None))
        if isinstance(attention, ExtendedSelfAttention):
            attention.streams = layer_inputs

        def run(active: torch.Tensor) -> torch.Tensor:
            return self._attention_and_mlp(active, layer_inputs, **kwargs)

        hidden_states = run(hidden_states) if self.altup is None else self.altup(hidden_states, run)
        if not isinstance(self.after_mlp, IdentityOp):
            hidden_states = self.after_mlp(hidden_states, layer_inputs)
        if self.has_scalar:
            hidden_states = hidden_states * self.layer_scalar
        if isinstance(attention, ExtendedSelfAttention):
            attention.streams = None
        # An attached loss returns a view, but the pipeline schedule frees the data of sent tensors and asserts that
        # they are not views.
        return make_viewless_tensor(
            inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True
        )

    def _attention_and_mlp(
        self, hidden_states: torch.Tensor, layer_inputs: LayerInputs, **kwargs: Any
    ) -> torch.Tensor:
        """Runs the layer except for its last slot, [s, b, h] -> [s, b, h]."""
        if not isinstance(self.before_layer, IdentityOp):
            hidden_states = self.before_layer(hidden_states, layer_inputs)
        if isinstance(self.feed_forward, IdentityOp) or not self.feed_forward.active:
            output, _ = super().forward(hidden_states=hidden_states, **kwargs)
        else:
            output = self.feed_forward(self, hidden_states, partial(self.attend, **kwargs), layer_inputs)
        return output

    def _add_parts_of_gemma3n(self, submodules: ExtendedLayerSubmodules) -> None:
        built = {
            name: build_module(
                getattr(submodules, name), config=self.config, eps=self.config.layernorm_epsilon
            )
            for name in ("laurel", "altup")
        }
        self.altup = None if isinstance(built["altup"], IdentityOp) else built["altup"]
        if not isinstance(built["laurel"], IdentityOp):
            self.laurel = built["laurel"]
            self.self_attn_bda: Callable[..., BiasDropoutAdd] = with_laurel(
                self.laurel, self.input_layernorm, self.self_attn_bda
            )

    def _separate_norm(self, name: str, linear: torch.nn.Module) -> None:
        """Sets a `NormInLinear` as the layer's norm if the linear layer computes this norm."""
        if hasattr(linear, "layer_norm_weight"):
            setattr(self, name, NormInLinear(linear))

    def attend(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Returns `Attention(LN1(x))` [s, b, h], with output projection, bias, sandwich norm and dropout, but without
        the residual.
        """
        # Like the engine's layer, remove these two before calling the attention.
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("context_mask", "padding_mask")
        }
        output = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        # The engine's bias-dropout-add always adds a residual, so pass zeros.
        zero = torch.zeros_like(hidden_states)
        return self.self_attn_bda(self.training, self.config.bias_dropout_fusion)(
            output, zero, self.hidden_dropout
        )
