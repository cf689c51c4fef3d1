"""AltUp, as in Gemma 3n: several residual streams; each layer runs on one of them, and predicts and corrects all.

A token has k streams x_1 .. x_k; x_1 is the active one. With m(v) = tanh(W_r RMSNorm(v) / h):

    predict     p_j = x_j + sum_i C[j, i] x_i,       C = W_p m(x_1), a matrix [k, k]
    layer       y = Layer(p_1)
    correct     x_j <- p_j + (1 + (W_c m(y))_j) (y - p_1)

Before the first layer, the streams are built from the word embedding e; after the last layer, they are joined. |v| is
the root mean square of v; in a denominator, it is at least sqrt(1e-5):

    start       x_1 = e,  x_j = |e| u / |u|  with u = W_j e
    end         x = (x_1 + sum_j |x_1| v_j / |v_j|) / k  with v_j = W'_j x_j

The streams are stored as rows, one stream after the other: hidden states are [k s, b, h]. To the pipeline schedule,
this is a longer sequence. Under sequence parallelism each rank has all streams of its s/t tokens; every weight is on
all ranks.
Sources: AltUp (arXiv 2301.13310); transformers' `Gemma3nTextAltUp`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.ops.norm import Norm, replicated_parameter

_LEAST_SQUARE = 1e-5


class AltUp(torch.nn.Module):
    """Predicts all streams, runs a layer on the active stream, and corrects all streams."""

    def __init__(
        self, config: TransformerConfig, eps: float, *, streams: int, coef_clip: float | None
    ) -> None:
        """Args:
        config: the engine's configuration.
        eps: epsilon of the norm.
        streams: k, the number of residual streams.
        coef_clip: largest absolute value of the weights W_p and W_c in training; None for no limit.
        """
        super().__init__()
        self.streams, self.coef_clip = streams, coef_clip
        self.router_norm = Norm(config, config.hidden_size, eps)
        self.router = replicated_parameter(config, streams, config.hidden_size)
        self.prediction = replicated_parameter(config, streams * streams, streams)
        self.correction = replicated_parameter(config, streams, streams)

    def forward(
        self, hidden_states: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Runs `layer`, [s, b, h] -> [s, b, h], within the streams, [k s, b, h] -> [k s, b, h]."""
        predicted = self._predict(hidden_states.unflatten(0, (self.streams, -1)))
        active = predicted[0]
        output = layer(active)
        coefficients = F.linear(self._modalities(output), self._clipped(self.correction)) + 1.0
        scales = coefficients.movedim(-1, 0).unsqueeze(-1)
        return torch.addcmul(predicted, scales, output - active).flatten(0, 1)

    def _predict(self, streams: torch.Tensor) -> torch.Tensor:
        """Returns the predictions [k, s, b, h] of streams [k, s, b, h]."""
        if self.training and self.coef_clip is not None:
            # As in transformers, the weight itself is limited in place, so that the limit does not stop the gradient.
            self.prediction.data.clamp_(-self.coef_clip, self.coef_clip)
        coefficients = F.linear(self._modalities(streams[0]), self.prediction)
        matrices = coefficients.unflatten(-1, (self.streams, self.streams))
        return streams + torch.einsum("sbji,isbh->jsbh", matrices, streams)

    def _modalities(self, values: torch.Tensor) -> torch.Tensor:
        """Returns m(v), [s, b, h] -> [s, b, k]."""
        routed = F.linear(self.router_norm(values) / values.size(-1), self.router)
        return torch.tanh(routed.float()).to(values.dtype)

    def _clipped(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training and self.coef_clip is not None:
            return weight.clamp(-self.coef_clip, self.coef_clip)
        return weight


class StartStreams(torch.nn.Module):
    """Builds the streams from the word embedding."""

    def __init__(self, config: TransformerConfig, streams: int) -> None:
        super().__init__()
        self.streams = streams
        self.weight = replicated_parameter(config, (streams - 1) * config.hidden_size, config.hidden_size)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Returns the streams, [s, b, h] -> [k s, b, h]."""
        projected = F.linear(embedding, self.weight).unflatten(-1, (self.streams - 1, -1)).movedim(2, 0)
        return torch.cat([embedding.unsqueeze(0), _scaled(projected, embedding)]).flatten(0, 1)


class JoinStreams(torch.nn.Module):
    """Joins the streams and applies the final norm; replaces the final norm in the engine's block."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, streams: int, norm: Any
    ) -> None:
        """Args:
        config: the engine's configuration.
        hidden_size: h.
        eps: epsilon of the norm.
        streams: k, the number of residual streams.
        norm: class of the norm.
        """
        super().__init__()
        self.streams = streams
        self.weight = replicated_parameter(config, (streams - 1) * hidden_size, hidden_size)
        self.norm = norm(config=config, hidden_size=hidden_size, eps=eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the output layer's input, [k s, b, h] -> [s, b, h]."""
        first, rest = hidden_states.unflatten(0, (self.streams, -1)).split([1, self.streams - 1])
        weights = self.weight.unflatten(0, (self.streams - 1, -1)).transpose(1, 2)
        projected = torch.bmm(rest.flatten(1, 2), weights).view_as(rest)
        joined = torch.cat([first, _scaled(projected, first[0])]).mean(0)
        normed: torch.Tensor = self.norm(joined)
        return normed


def _scaled(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Scales each vector of values [k - 1, s, b, h] to the magnitude of the same token's vector in `like` [s, b,
    h].
    """
    root = like.size(-1) ** 0.5
    # The gradient of a vector norm at zero is zero; the gradient of a square root would be infinite.
    wanted = torch.linalg.vector_norm(like, dim=-1, keepdim=True) / root
    found = values.square().mean(-1, keepdim=True).clamp_min(_LEAST_SQUARE).sqrt()
    return values * wanted / found


class RotaryOfStreams(torch.nn.Module):
    """A rotary embedding whose length is the sequence length, not the k times larger number of rows."""

    def __init__(self, rotary: torch.nn.Module, streams: int) -> None:
        super().__init__()
        self.rotary: Any = rotary
        self.streams = streams

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        block: torch.nn.Module,
        hidden_states: torch.Tensor | None,
        config: TransformerConfig,
        packed_seq_params: Any = None,
    ) -> int:
        """Returns the number of positions, like the engine's method of the same name."""
        found: int = self.rotary.get_rotary_seq_len(
            inference_context, block, hidden_states, config, packed_seq_params
        )
        # A cache or packed documents specify the length; otherwise it is the number of rows, divided by k.
        is_known = inference_context is not None or packed_seq_params is not None
        return found if is_known else found // self.streams

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the engine's rotary embedding."""
        angles: torch.Tensor = self.rotary(*args, **kwargs)
        return angles
