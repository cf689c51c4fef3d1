"""The one transformer layer of all families: megatron-core's, with three more slots.

    x      <- before_layer(x, side)
    x      <- x + Attention(LN1(x))
    x      <- x + MLP(LN2(x))                    or, in the place of both lines, feed_forward(layer, x, attend, side)
    output <- after_mlp(x, side)

A slot that is `IdentityOp` is not called and costs nothing; with all three empty the layer is megatron-core's own code
path. The slots know nothing of families: a family puts a module into one through the layer's spec.
Shapes: hidden states [s, b, h] ([s/t, b, h] under sequence parallel).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor

from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs
from megatron_ext.models.ops.attention import SDPAttention

SLOTS = ("before_layer", "feed_forward", "after_mlp")


@dataclass
class ExtendedLayerSubmodules(TransformerLayerSubmodules):
    """megatron-core's submodules and the slots, built with `config=`, `layer_number=` and `pg_collection=`."""

    before_layer: ModuleSpec | type = IdentityOp
    """`forward(hidden_states, side) -> hidden_states`, before the attention's norm."""

    feed_forward: ModuleSpec | type = IdentityOp
    """`forward(layer, hidden_states, attend, side) -> hidden_states`: takes the place of attention and MLP, with the
    layer's input, its own norms and MLP, and `attend` (the layer's `attend`, which needs the input alone) in its reach.
    While its attribute `active` is False the layer is megatron-core's own code path, as with the empty slot."""

    after_mlp: ModuleSpec | type = IdentityOp
    """`forward(hidden_states, side) -> hidden_states`, on the layer's output."""


class ExtendedTransformerLayer(TransformerLayer):
    """megatron-core's layer with the slots of `ExtendedLayerSubmodules`."""

    def __init__(
        self, *args: Any, submodules: ExtendedLayerSubmodules, auxiliary: AuxiliaryInputs, **kwargs: Any
    ) -> None:
        super().__init__(*args, submodules=submodules, **kwargs)
        self.auxiliary = auxiliary
        for slot in SLOTS:
            module = build_module(
                getattr(submodules, slot),
                config=self.config,
                layer_number=self.layer_number,
                pg_collection=self.pg_collection,
            )
            setattr(self, slot, module)
        self.skipped = False
        """The layer passes on what it gets; see `GPTModel.run_layers`."""

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer.

        Args:
            hidden_states: [s, b, h].
            context: the packed auxiliary streams, see `auxiliary_inputs`.
            **kwargs: what megatron-core's block passes on (mask, rotary embedding, KV cache, ...).

        Returns:
            The output [s, b, h] and the auxiliary streams for the next layer.
        """
        if self.skipped:
            return hidden_states, context
        layer_inputs = self.auxiliary.open(context, hidden_states)
        if isinstance(self.self_attention.core_attention, SDPAttention):
            self.self_attention.core_attention.take_rotary(kwargs.pop("rotary_pos_emb", None))
        if not isinstance(self.before_layer, IdentityOp):
            hidden_states = self.before_layer(hidden_states, layer_inputs)
        if isinstance(self.feed_forward, IdentityOp) or not self.feed_forward.active:
            hidden_states, _ = super().forward(hidden_states=hidden_states, **kwargs)
        else:
            hidden_states = self.feed_forward(
                self, hidden_states, partial(self.attend, **kwargs), layer_inputs
            )
        if not isinstance(self.after_mlp, IdentityOp):
            hidden_states = self.after_mlp(hidden_states, layer_inputs)
        # A slot may return a view (an attached loss does), but a pipeline stage frees what it has sent: no view.
        hidden_states = make_viewless_tensor(
            inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True
        )
        return hidden_states, layer_inputs.packed

    def attend(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`Attention(LN1(x))` after the output projection, bias and dropout included, residual not: [s, b, h]."""
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("context_mask", "padding_mask")
        }
        output = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        zero = torch.zeros_like(hidden_states)
        return self.self_attn_bda(self.training, self.config.bias_dropout_fusion)(
            output, zero, self.hidden_dropout
        )
