"""The block of per-layer embedding (PLE) in one layer; it fills a slot of the layer.

    x <- x + PostNorm_h( W_out( act(W_gate x) * dropout(c) ) )

With the preset gemma4, x is then multiplied by `layer_scalar`. With the preset gemma3n, the block's input is AltUp's
active stream times a vector [h], and the update is added to each of the other streams instead. `c` is the layer's
part of the stream `per_layer`, [s, b, p / t]. `W_gate` is column-parallel and `W_out` row-parallel over p; under
sequence parallelism x is [s / t, b, h]. The post-norm is always an RMSNorm, whatever norm the base model has.
Source: Gemma 3n and Gemma 4; PerLayerGate in docs/design/per_layer_embedding.md.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.auxiliary_inputs import LayerInputs
from megatron_ext.models.ops.norm import RMSNorm, replicated_parameter
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_inputs import PER_LAYER_STREAM
from megatron_ext.per_layer.sharded_weight import initial_std, mark
from megatron_ext.per_layer.statistics_recorder import Recorder
from megatron_ext.platform import process_groups

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


class PerLayerBlock(MegatronModule):
    """Gates a layer's per-layer vector into the residual stream; see the formula at the top of this file."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        *,
        settings: PerLayerConfig,
        part: int,
        parts: int,
    ) -> None:
        """Args:
        config: the engine's configuration.
        layer_number: number of the layer in the whole model, from 1.
        pg_collection: the process groups; p is split over the tensor-parallel group.
        settings: PLE's configuration.
        part: index of the layer in its stage, from 0.
        parts: number of layers of the stage.
        """
        super().__init__(config)
        self.settings = settings
        self.layer_number = layer_number
        self.part, self.parts = part, parts
        hidden, width = config.hidden_size, settings.per_layer_hidden_size
        common = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": False,
            "tp_group": pg_collection.tp,
        }
        self.gate = ColumnParallelLinear(hidden, width, gather_output=False, **common)
        self.projection = RowParallelLinear(width, hidden, input_is_parallel=True, **common)
        # An RMSNorm, as in Gemma 3n and 4, whatever norms the base model has.
        self.post_norm = RMSNorm(config, hidden, config.layernorm_epsilon, zero_centered=False)
        mark(self.gate.weight, initial_std(settings, config.init_method_std, width, hidden))
        mark(self.projection.weight, initial_std(settings, config.init_method_std, hidden, width))
        mark(self.post_norm.weight, 0.0)
        if settings.has_layer_scalar:
            ones = torch.ones(1, dtype=config.params_dtype, device=process_groups.device())
            self.register_buffer("layer_scalar", ones)
        if settings.adds_to_inactive_streams:
            self.input_scale = replicated_parameter(config, hidden, value=1.0)
            mark(self.input_scale, 0.0)
        self.activation = ACTIVATIONS[settings.per_layer_gate_activation]
        self.recorder: Recorder | None = None

    def forward(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        """Applies the block, [s, b, h] -> [s, b, h] ([s / t, b, h] under sequence parallelism)."""
        if self.settings.adds_to_inactive_streams:
            active, others = hidden_states.split(
                [layer_inputs.rows, hidden_states.size(0) - layer_inputs.rows]
            )
            update = self.post_norm(self._projected(active * self.input_scale, layer_inputs))
            by_stream = others.view(-1, *active.shape) + update
            return torch.cat([active, by_stream.flatten(0, 1)])
        output = self.post_norm(self._projected(hidden_states, layer_inputs), residual=hidden_states)
        return output * self.layer_scalar if self._scales() else output

    def _scales(self) -> bool:
        """Returns whether the output must be multiplied by `layer_scalar`."""
        # In a run from scratch the scalar stays 1. Checking this costs nothing on the CPU; on a GPU the host would
        # wait.
        return self.settings.has_layer_scalar and (self.layer_scalar.is_cuda or bool(self.layer_scalar != 1))

    def _projected(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        """Returns the block's output before the post-norm, [s, b, h]."""
        combined = layer_inputs.read_part(PER_LAYER_STREAM, self.part, self.parts)
        activated = self.activation(self.gate(hidden_states)[0])
        projected: torch.Tensor = self.projection(activated * self._dropped(combined))[0]
        # With activation recomputation, this code runs twice, first without gradients; record only the second run.
        if self.recorder is not None and torch.is_grad_enabled():
            self.recorder.add_mean("gate_activation", activated.unsqueeze(0))
            with torch.no_grad():
                self.recorder.add_squares("update", self.post_norm(projected).unsqueeze(0))
            self.recorder.add_squares("residual", hidden_states.unsqueeze(0))
        return projected

    def _dropped(self, combined: torch.Tensor) -> torch.Tensor:
        rate = self.settings.per_layer_projection_dropout
        if rate == 0.0 or not self.training:
            return combined
        # Ranks hold different parts of p and need different masks. Under sequence parallelism, the engine has already
        # entered the random stream that differs between ranks.
        with contextlib.ExitStack() as stack:
            if not self.config.sequence_parallel:
                stack.enter_context(tensor_parallel.get_cuda_rng_tracker().fork())
            return F.dropout(combined, rate)
