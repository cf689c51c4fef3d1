"""Core attention on `torch.nn.functional.scaled_dot_product_attention`: flash kernels on GPU and CPU, no [s, s] scores.

Letters: `s_q`, `s_k` query and key lengths, `b` micro-batch size, `n` query heads and `g` key/value heads of this
tensor-parallel rank, `d` head size. Inputs are [s_q, b, n, d] and [s_k, b, g, d], the output is [s_q, b, n * d].
With a KV cache the queries are the last `s_q` of the `s_k` positions.

Under context parallelism a rank has two chunks of every sequence (`context_parallel`). Rotated keys and values are
gathered over the ranks; each of the two chunks of queries attends to the keys up to its own end.

With a sliding window of `w` tokens, a query attends only to the last `w` of these keys (`windowed_attention`). If a
sequence holds several documents, a query attends only to keys of its own document (`documents`).
"""

import contextlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.ops.causal_attention import allowed_keys, attend_at_end
from megatron_ext.models.ops.context_parallel import chunks_of_rank, gather_sequence, positions_of_rank
from megatron_ext.models.ops.documents.document_attention import attend_to_documents
from megatron_ext.models.ops.plain_strides import plain_strides
from megatron_ext.models.ops.rotary import rotate
from megatron_ext.models.ops.windowed_attention import attend_in_window
from megatron_ext.platform import process_groups


class SDPAttention(torch.nn.Module):
    """Torch's fused attention behind megatron-core's core-attention interface."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        window: int | None = None,
        rotary_part: tuple[int, int] | None = None,
        rotary_scale: float = 1.0,
        rotates: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        assert window is None or attn_mask_type is AttnMaskType.causal, (
            "a sliding window requires causal attention"
        )
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.window = window
        """Number of keys that a query attends to, including its own; None for all earlier keys."""
        group = None if pg_collection is None else pg_collection.cp
        self.context_group = group if group is not None and group.size() > 1 else None
        """The ranks that share each sequence; None if a single rank holds it."""
        self.rotary_part = rotary_part
        """Start and size of this layer's part of the rotary embedding; None for the whole embedding; see
        `take_rotary`.
        """
        self.rotary_scale = rotary_scale
        """Factor of rotated queries and keys."""
        self.rotates = rotates
        """Whether queries and keys are rotated at all."""
        self._angles: torch.Tensor | None = None
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None

    def take_rotary(self, angles: torch.Tensor | None) -> None:
        """Sets the rotary embedding that `forward` applies to queries and keys, in place of the engine's slower one.

        Args:
            angles: [positions, 1, 1, r], the engine's rotary embedding (its halves are equal), or None for no rotation;
                [positions, b, 1, r] if each sequence has its own embedding (`RotaryByLength`). If layers have different
                embeddings, each half holds all of these, one after the other.
        """
        # The engine caches its embedding, so the same object arrives at every call. Keep cos and sin as long as the
        # object is the same.
        if angles is not self._angles and self.rotates:
            self._angles, self._cos_sin = angles, None

    def _rotated(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._angles is None:
            return query, key
        if (
            self.config.apply_rope_fusion and self._angles.size(1) == 1
        ):  # TE's kernel has one table for all sequences
            return self._rotated_by_te(self._angles, query, key)
        if self._cos_sin is None:
            half = self._angles[..., : self._angles.size(-1) // 2]
            if self.rotary_part is not None:
                half = half.narrow(-1, *self.rotary_part)
            pair = half.cos() * self.rotary_scale, half.sin() * self.rotary_scale
            self._cos_sin = pair[0].to(query.dtype), pair[1].to(query.dtype)
        # Queries are at the last positions of the keys. A KV cache holds keys before rotation, so all keys are
        # rotated here.
        end, start = key.size(0), key.size(0) - query.size(0)
        cos, sin = self._cos_sin
        return rotate(query, cos[start:end], sin[start:end]), rotate(key, cos[:end], sin[:end])

    def _rotated_by_te(
        self, angles: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A single kernel, which reads sine and cosine in fp32 and rounds only the result.
        end, start = key.size(0), key.size(0) - query.size(0)
        rotated = partial(apply_rotary_pos_emb, config=self.config)
        return rotated(query, angles[start:end]), rotated(key, angles[:end])

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Computes attention.

        Args:
            query: [s_q, b, n, d].
            key: [s_k, b, g, d]; `g` must divide `n`.
            value: [s_k, b, g, d].
            attention_mask: [b, 1, s_q, s_k], True where attention is forbidden, or None. Under context parallelism it
                covers the keys of all ranks.
            attn_mask_type: overrides the module's own mask type; the engine passes `no_mask` when decoding with a KV
                cache.
            attention_bias: not supported, must be None.
            packed_seq_params: the bounds of the documents, in host memory; see `document_bounds.packed_documents`.

        Returns:
            [s_q, b, n * d].
        """
        assert attention_bias is None, "SDPAttention does not support attention_bias"
        kind = attn_mask_type or self.attn_mask_type
        query, key = self._rotated(query, key)
        group = self.context_group
        if group is not None:
            # Concatenate keys and values, so that one collective gathers both.
            whole = gather_sequence(torch.cat([key, value], dim=-1), group)
            key, value = whole.split([key.size(-1), value.size(-1)], dim=-1)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with self._random_stream(dropout):
            if packed_seq_params is not None:
                assert attention_mask is None, "SDPAttention supports a mask or document bounds, not both"
                return self._of_documents(
                    query,
                    key,
                    value,
                    packed_seq_params.cu_seqlens_q,
                    kind is not AttnMaskType.no_mask,
                    dropout,
                )
            if group is not None and attention_mask is None and kind is not AttnMaskType.no_mask:
                return self._of_two_chunks(group, query, key, value, dropout)
            if self.window is not None and (attention_mask is None or self._decodes(kind)):
                return plain_strides(_by_position(self._at_end(query, key, value, dropout)))
            return self._of_all(query, key, value, attention_mask, kind, dropout)

    def _of_all(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kind: AttnMaskType,
        dropout: float,
    ) -> torch.Tensor:
        mask, causal = self._mask(query, key, attention_mask, kind)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return plain_strides(_by_position(context))

    def _of_documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        causal: bool,
        dropout: float,
    ) -> torch.Tensor:
        """Returns the attention of this rank's queries to the keys, from all ranks, of the same document."""
        firsts, chunks = [0], [query]
        if self.context_group is not None:
            chunks = list(query.chunk(2, dim=2))
            numbers = chunks_of_rank(self.context_group.rank(), self.context_group.size())
            firsts = [number * chunks[0].size(2) for number in numbers]
        outputs = [
            _by_position(
                attend_to_documents(
                    of_chunk,
                    key,
                    value,
                    bounds,
                    first=first,
                    causal=causal,
                    window=self.window,
                    dropout=dropout,
                    scale=self.softmax_scale,
                )
            )
            for first, of_chunk in zip(firsts, chunks, strict=True)
        ]
        return plain_strides(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _of_two_chunks(
        self,
        group: dist.ProcessGroup,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        """Returns the causal attention of this rank's two chunks of queries to the keys of all ranks."""
        numbers = chunks_of_rank(group.rank(), group.size())
        outputs = []
        for number, of_chunk in zip(numbers, query.chunk(2, dim=2), strict=True):
            end = (number + 1) * of_chunk.size(2)
            context = self._at_end(of_chunk, key[:, :, :end], value[:, :, :end], dropout)
            outputs.append(_by_position(context))
        return torch.cat(outputs)

    def _at_end(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Returns the causal attention, within the window, of queries at the last positions of the keys."""
        if self.window is None:
            return attend_at_end(query, key, value, dropout=dropout, scale=self.softmax_scale)
        return attend_in_window(query, key, value, self.window, dropout=dropout, scale=self.softmax_scale)

    def _mask(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, kind: AttnMaskType
    ) -> tuple[torch.Tensor | None, bool]:
        """Returns torch's `attn_mask` (True where attention is allowed) and `is_causal`."""
        queries, keys = query.size(2), key.size(2)
        if attention_mask is not None and not self._decodes(kind):
            allowed = attention_mask.logical_not()
            return allowed if self.window is None else allowed & self._window_mask(queries, keys), False
        if queries == keys or self.context_group is not None:
            return None, kind is not AttnMaskType.no_mask
        if queries == 1:
            return None, False
        # torch aligns `is_causal` at the first key, but with a KV cache the last query belongs to the last key.
        return allowed_keys(queries, keys, query.device), False

    def _decodes(self, kind: AttnMaskType) -> bool:
        """Returns whether a causal model decodes with a cache; `attention_mask` is then ignored."""
        return kind is AttnMaskType.no_mask and self.attn_mask_type is not AttnMaskType.no_mask

    def _window_mask(self, queries: int, keys: int) -> torch.Tensor:
        """Returns a mask [s_q, s_k], False for keys before the query's window. Keys after the query remain True;
        `attention_mask` excludes them.
        """
        assert self.window is not None
        positions = torch.arange(keys - queries, keys)
        if self.context_group is not None:
            positions = positions_of_rank(keys, self.context_group)
        return (positions.unsqueeze(1) - torch.arange(keys) < self.window).to(process_groups.device())

    def _random_stream(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        if dropout == 0.0 or self.config.sequence_parallel:
            return (
                contextlib.nullcontext()
            )  # under sequence parallelism, the engine has already entered this random stream
        # Each tensor-parallel rank has different heads, so each needs a different dropout mask.
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _by_position(context: torch.Tensor) -> torch.Tensor:
    """Reorders [b, n, s_q, d] to [s_q, b, n * d]."""
    return context.permute(2, 0, 1, 3).flatten(2)
