"""megatron-core's self-attention with a KV cache no longer than the window, and with keys and values of other layers.

The engine's cache has a row for every position. Here a layer with a window of w tokens keeps the last w - 1 keys and
values; a later query attends to these and to its own. Keys are cached before rotation. Since rotary attention depends
only on differences of positions, the keys that remain in the cache may be numbered from 0.

For each key/value group, the projection `linear_qkv` computes the query heads, followed by

    a key head and a value head     as in the engine
    a key head                      if values are keys: v = k, taken before the norm of the keys
    nothing                         if the layer uses the keys and values of an earlier layer

A layer that supplies keys and values to later layers writes them to an auxiliary stream, after their norms and before
rotation. The stream passes through activation recomputation and to later pipeline stages; its layout is
[s, b, 2 g d], a key and a value for each group. With a KV cache, the first of a stage's layers that use the stream
keeps the cache, and the others read it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.models.ops.norm import unit_rms


class Streams(Protocol):
    """A layer's auxiliary streams (`auxiliary_inputs.LayerInputs`)."""

    def read(self, name: str) -> torch.Tensor:
        """Returns a stream."""

    def write(self, name: str, value: torch.Tensor) -> None:
        """Replaces a stream."""


@dataclass(frozen=True, kw_only=True)
class KeyValueSettings:
    """The source of a layer's keys and values, and whether other layers use them."""

    values_are_keys: bool = False
    """Whether the keys are also used as values."""

    normalizes_values: bool = False
    """Whether values are divided by their root mean square."""

    stream: str | None = None
    """Auxiliary stream with keys and values that several layers use; None if the layer shares none."""

    reads_stream: bool = False
    """Whether the layer reads its keys and values from the stream. If False, the layer computes them, and writes them
    to the stream if there is one.
    """

    keeps_cache: bool = True
    """Whether the layer keeps the KV cache for all layers of its stage that use the same keys and values."""


class ExtendedSelfAttention(SelfAttention):
    """Self-attention whose core attention may have a `window`, with keys and values according to
    `KeyValueSettings`.
    """

    def __init__(self, *args: Any, key_values: KeyValueSettings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key_values = key_values or KeyValueSettings()
        self.streams: Streams | None = None
        """The layer's auxiliary streams, while the layer runs."""

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries [s, b, n, d], keys and values [s, b, g, d]."""
        settings = self.key_values
        if settings.reads_stream:
            return (self._queries(hidden_states), *self._read_shared())
        if settings.values_are_keys:
            query, key, value = self._queries_and_keys(hidden_states)
        else:
            query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if settings.normalizes_values:
            value = unit_rms(value, self.config.layernorm_epsilon)
        if settings.stream is not None:
            assert self.streams is not None, "the layer sets the streams"
            self.streams.write(settings.stream, torch.cat([key, value], dim=-1).flatten(2))
        return query, key, value

    def _read_shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.streams is not None and self.key_values.stream is not None
        joined = self.streams.read(self.key_values.stream)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        key, value = joined.view(*joined.shape[:2], groups, 2 * width).split(width, dim=-1)
        return key, value

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected, _ = self.linear_qkv(hidden_states)
        query = projected.view(*projected.shape[:2], -1, self.hidden_size_per_attention_head)
        return self.q_layernorm(query)

    def _queries_and_keys(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits a projection without value heads into queries, normalized keys, and keys without the norm."""
        projected, _ = self.linear_qkv(hidden_states)
        groups, ranks, rank = self.config.num_query_groups, self.tp_group.size(), self.tp_group.rank()
        copies = max(1, ranks // groups)
        # If several ranks share a group, each needs the whole group, but uses only its part of the queries.
        if copies > 1:
            projected = all_gather_last_dim_from_tensor_parallel_region(projected, group=self.tp_group)
            projected = projected.chunk(groups, dim=-1)[rank // copies]
        width, local = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        by_group = projected.unflatten(-1, (local, -1))
        query, key = by_group.split([by_group.size(-1) - width, width], dim=-1)
        query = query.reshape(*query.shape[:2], -1, width)
        if copies > 1:
            query = query.chunk(copies, dim=2)[rank % copies]
        return self.q_layernorm(query), self.k_layernorm(key), key

    def _adjust_key_value_for_inference(
        self,
        inference_context: StaticInferenceContext | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, AttnMaskType, None]:
        """Adds keys and values [s, b, g, d] to the cache; returns the keys and values that the queries may attend
        to.
        """
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        cache, shared = inference_context.key_value_memory_dict, self.key_values.stream
        if not self.key_values.keeps_cache:
            key, value = cache[shared]
        elif self.core_attention.window is not None:
            key, value = self._add_to_window(inference_context, key, value)
        else:
            _, key, value, *_ = super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        if shared is not None:
            cache[shared] = key, value
        # The engine, too, drops the mask after the first pass.
        kind = AttnMaskType.no_mask if inference_context.sequence_len_offset > 0 else self.attn_mask_type
        return query, key, value, rotary_pos_emb, kind, None

    def _add_to_window(
        self, inference_context: StaticInferenceContext, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cached keys and values followed by the new ones; the cache then keeps those that later queries
        attend to.
        """
        cache = inference_context.key_value_memory_dict
        if inference_context.sequence_len_offset > 0:
            before = cache[self.layer_number]
            key, value = (torch.cat(pair) for pair in zip(before, (key, value), strict=True))
        first = max(0, key.size(0) - self.core_attention.window + 1)
        # Store copies, because a view would keep the keys of the whole prompt in memory.
        cache[self.layer_number] = key[first:].clone(), value[first:].clone()
        return key, value
