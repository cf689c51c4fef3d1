"""megatron-core's self-attention with a KV cache that holds no more keys than the sliding window.

The engine's cache has a row for every position. Here a layer with a window of w tokens keeps the last w - 1 keys and
values: what later queries see beside their own. Cached keys are not rotated yet; rotary attention depends on
differences of positions only, so those that remain may be numbered from 0.
"""

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType


class WindowedSelfAttention(SelfAttention):
    """Self-attention whose core attention has a `window`."""

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
        """Adds keys and values [s, b, g, d] to the cache; returns those that the queries may attend to."""
        kind = self.attn_mask_type
        if inference_context is None:
            return query, key, value, rotary_pos_emb, kind, None
        cache = inference_context.key_value_memory_dict
        if inference_context.sequence_len_offset > 0:
            before = cache[self.layer_number]
            key, value = (torch.cat(pair) for pair in zip(before, (key, value), strict=True))
            kind = AttnMaskType.no_mask  # as the engine does after the first pass
        first = max(0, key.size(0) - self.core_attention.window + 1)
        # Copies, because a view would keep the keys of the whole prompt.
        cache[self.layer_number] = key[first:].clone(), value[first:].clone()
        return query, key, value, rotary_pos_emb, kind, None
