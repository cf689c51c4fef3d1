"""Marks where documents begin in a sample, in place of mcore's mask of [s, s] values per sample.

As in Megatron-LM an end-of-document token belongs to the document that it ends, and the token after it begins the next
one; a sample begins a document, even in the middle of one. mcore restarts the position ids at exactly these tokens, so
it is asked to do so, and the marks are read from the position ids.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_ext.config.groups.data_config import DataConfig

DOCUMENT_STARTS = "document_starts"
"""Name of the field [s] that is True at each document's first token."""


@dataclass
class DocumentsConfig(GPTDatasetConfig):
    """mcore's configuration of its datasets; `document_settings` gives the fields that are about documents."""

    keeps_positions: bool = False
    """Whether the position ids that mcore restarts are replaced by those that count through the sample."""


def document_settings(data: DataConfig) -> dict[str, Any]:
    """Returns the fields of a `DocumentsConfig` for the run's flags."""
    return {
        "reset_position_ids": data.reset_position_ids or data.reset_attention_mask,
        "keeps_positions": not data.reset_position_ids,
        "reset_attention_mask": data.reset_attention_mask,
        "eod_mask_loss": data.eod_mask_loss,
        "create_attention_mask": False,
    }


def with_documents(sample: dict[str, torch.Tensor], config: DocumentsConfig) -> dict[str, torch.Tensor]:
    """Returns the sample with `document_starts` if attention is reset at documents, and the right position ids."""
    if not config.reset_attention_mask:
        return sample
    positions = sample["position_ids"]
    marked = {DOCUMENT_STARTS: positions == 0}
    if config.keeps_positions:
        marked["position_ids"] = torch.arange(positions.numel())
    return sample | marked
