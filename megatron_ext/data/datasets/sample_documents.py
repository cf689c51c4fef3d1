"""Marks the first token of each document in a sample, which takes less memory than mcore's mask of [s, s] values.

As in Megatron-LM, an end-of-document token belongs to the document that it ends, and the next token begins a new
document. The first token of a sample also counts as a beginning, even if the sample starts within a document. mcore
can restart the position ids at exactly these tokens; this module lets it do so and reads the marks from the position
ids.
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
    """mcore's configuration of its datasets; `document_settings` returns the fields that concern documents."""

    keeps_positions: bool = False
    """True if position ids count 0, 1, 2, ... over the whole sample instead of restarting at each document."""


def document_settings(data: DataConfig) -> dict[str, Any]:
    """Returns the fields of a `DocumentsConfig` that follow from the run's flags."""
    return {
        "reset_position_ids": data.reset_position_ids or data.reset_attention_mask,
        "keeps_positions": not data.reset_position_ids,
        "reset_attention_mask": data.reset_attention_mask,
        "eod_mask_loss": data.eod_mask_loss,
        "create_attention_mask": False,
    }


def with_documents(sample: dict[str, torch.Tensor], config: DocumentsConfig) -> dict[str, torch.Tensor]:
    """Returns the sample with the position ids that the flags require, and with `document_starts` if attention is
    reset at documents.
    """
    if not config.reset_attention_mask:
        return sample
    positions = sample["position_ids"]
    marked = {DOCUMENT_STARTS: positions == 0}
    if config.keeps_positions:
        marked["position_ids"] = torch.arange(positions.numel())
    return sample | marked
