"""megatron-core's rotary embedding with frequencies that depend on the length of the sequence (`rope_scaling`).

In a pass without a KV cache, all positions have the frequencies for the sequence's length. In generation, the positions
of the first pass have the frequencies for the length of that pass, and each later position p has the frequencies for
length p + 1. This equals transformers, which caches keys after their rotation. If sequences hold several documents,
a document's positions have the frequencies for the document's own length, as if the document were alone.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.ops.positions.rope_scaling import frequencies_at


class RotaryByLength(RotaryEmbedding):
    """Rotary embedding for --rope-scaling-type dynamic and longrope.

    Args:
        model: configuration of the base model.
        cp_group: the ranks that share each sequence.
    """

    def __init__(self, model: ModelConfig, cp_group: torch.distributed.ProcessGroup | None) -> None:
        super().__init__(
            model.resolved_kv_channels, model.rotary_percent, rotary_base=model.rotary_base, cp_group=cp_group
        )
        self.model = model
        self._first_pass: int | None = None
        self._documents: torch.Tensor | None = None
        self._table: tuple[Any, torch.Tensor] | None = None

    def begin(
        self, inference_context: Any, tokens: int, document_lengths: torch.Tensor | None = None
    ) -> None:
        """Prepares for a pass.

        Args:
            inference_context: the KV cache, or None.
            tokens: number of tokens of each sequence, without those in the cache.
            document_lengths: [s, b], the length of each token's document in whole sequences; None if each sequence is
                one document.
        """
        if self._documents is not None or document_lengths is not None:
            self._documents, self._table = document_lengths, None
        if inference_context is None:
            self._first_pass = None
        elif inference_context.sequence_len_offset == 0:
            self._first_pass = tokens

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Returns the angles [max_seq_len, r / 2] of the positions from `offset` on."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        lengths = (positions + 1).clamp(min=self._first_pass or max_seq_len)
        return positions.unsqueeze(1) * frequencies_at(self.model, lengths)

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Returns the angles, or this rank's part of them under context parallelism.

        Returns:
            [max_seq_len, 1, 1, r]; with documents [max_seq_len, b, 1, r].
        """
        key = (max_seq_len, offset, packed_seq, self._first_pass)
        if self._table is None or self._table[0] != key:
            if self._documents is None:
                angles = self.get_emb(max_seq_len, offset)
            else:
                angles = self._of_documents(self._documents)
            group = cp_group or self.cp_group
            if group is not None and group.size() > 1 and not packed_seq:
                angles = get_pos_emb_on_this_cp_rank(angles, 0, group)
            # The attention keeps sine and cosine while the same object arrives.
            self._table = key, angles
        return self._table[1]

    def _of_documents(self, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the angles [s, b, 1, r] of whole sequences, for documents of these lengths [s, b].

        Positions are counted from the sequence's beginning, because attention depends only on their differences
        within a document.
        """
        lengths = lengths.to(self.inv_freq.device, non_blocking=True)
        frequencies = frequencies_at(self.model, lengths.flatten()).unflatten(0, lengths.shape)
        positions = torch.arange(lengths.size(0), device=lengths.device, dtype=torch.float32)
        angles = positions.view(-1, 1, 1) * frequencies
        return torch.cat([angles, angles], dim=-1).unsqueeze(2)
