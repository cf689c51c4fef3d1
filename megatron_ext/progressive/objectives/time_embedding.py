"""The time embedding: an embedding of a sequence's time step t, added to all word embeddings of the sequence.

    x_0 = word embedding + W e(t)                     W: [h, d]
    sinusoidal    e(t) = [cos(t w_j) ; sin(t w_j)],  w_j = 10000^(-2j/d), t = 0 .. T - 1       (arXiv 2006.11239)
    learned       e(t) = row t of a table [T, d]

The module belongs to the first pipeline stage, and is replicated on every tensor-parallel rank. Initially W e(t) is
about as large as a word embedding. Source: docs/design/progressive_growth.md.
"""

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.model_extension import StageInfo, StageModule
from megatron_ext.platform import process_groups
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


class TimeEmbedding(StageModule):
    """Adds the time embedding to the word embedding."""

    def __init__(self, config: TransformerConfig, settings: ProgressiveConfig) -> None:
        """Args:
        config: megatron-core's transformer configuration.
        settings: contains the kind and the width of the embedding, and the number of time steps.
        """
        super().__init__()
        width, device = settings.time_embedding_dim, process_groups.device()
        self.learned = settings.time_encoding_type == "learned"
        self.projection = torch.nn.Parameter(torch.empty(config.hidden_size, width, device=device))
        # The mean square of e(t) is 1 (learned) or 1/2 (sinusoidal).
        std = config.init_method_std / math.sqrt(width if self.learned else width / 2)
        self.projection.init_std = std  # type: ignore[attr-defined]
        if self.learned:
            self.table = torch.nn.Parameter(
                torch.empty(settings.resolved_num_time_steps, width, device=device)
            )
            self.table.init_std = 1.0  # type: ignore[attr-defined]
        for parameter in self.parameters():
            # With sequence parallelism, a rank's gradient covers only the rank's tokens; with this attribute, the
            # engine sums the ranks' gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def embed(self, embedding: torch.Tensor, auxiliary_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns `embedding` [s, b, h] plus the embedding of the auxiliary input `time_step` [b].

        Raises:
            ValueError: the batch has no time steps.
        """
        if TIME_STEP not in auxiliary_inputs:
            raise ValueError("--time-interpretation input: requires time_step [b] in every batch")
        steps = auxiliary_inputs[TIME_STEP]
        encoded = self.table[steps] if self.learned else sinusoidal(steps, self.projection.size(1))
        return embedding + encoded.to(self.projection.dtype) @ self.projection.t()


def sinusoidal(steps: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the sinusoidal e(t), [b, width] in fp32, for integer steps [b]; with odd width, the last value is 0."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / max(1, half) * torch.arange(half, device=steps.device))
    angles = steps.float().unsqueeze(1) * frequencies
    encoded = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(encoded, (0, width - 2 * half))


def time_embedding(
    config: TransformerConfig, settings: ProgressiveConfig, stage: StageInfo
) -> TimeEmbedding | None:
    """Returns the time embedding on the first pipeline stage, None on other stages."""
    return TimeEmbedding(config, settings) if stage.is_first else None
