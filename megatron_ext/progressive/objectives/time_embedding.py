"""Tells the model the time step of each sequence: an embedding that is added to every word embedding.

    x_0 = word embedding + W e(t)                     W: [h, d]
    sinusoidal    e(t) = [cos(t w_j) ; sin(t w_j)],  w_j = 10000^(-2j/d), t in steps of T      (arXiv 2006.11239)
    learned       e(t) = row t of a table [T, d]

It is a part of the first pipeline stage; every tensor-parallel rank has all of it. At the beginning W e(t) is about as
large as a word embedding. Source: document 004.
"""

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.model_extension import StageInfo, StageModule
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


class TimeEmbedding(StageModule):
    """The time embedding of a model."""

    def __init__(self, config: TransformerConfig, settings: ProgressiveConfig) -> None:
        """Args:
        config: the engine's.
        settings: kind and width of the embedding, number of time steps.
        """
        super().__init__()
        width = settings.time_embedding_dim
        self.learned = settings.time_encoding_type == "learned"
        self.projection = torch.nn.Parameter(torch.empty(config.hidden_size, width))
        # e(t) has values of about 1 (learned), or squares of 1/2 in the mean (sinusoidal).
        std = config.init_method_std / math.sqrt(width if self.learned else width / 2)
        self.projection.init_std = std  # type: ignore[attr-defined]
        if self.learned:
            self.table = torch.nn.Parameter(torch.empty(settings.resolved_num_time_steps, width))
            self.table.init_std = 1.0  # type: ignore[attr-defined]
        for parameter in self.parameters():
            # Under sequence parallel a rank sees its rows only; the engine sums the gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def embed(self, embedding: torch.Tensor, auxiliary_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`embedding` [s, b, h] with that of the auxiliary input `time_step` [b] added.

        Raises:
            ValueError: the batch has no time steps.
        """
        if TIME_STEP not in auxiliary_inputs:
            raise ValueError("--time-interpretation input: the batch has no time_step [b]")
        steps = auxiliary_inputs[TIME_STEP]
        encoded = self.table[steps] if self.learned else sinusoidal(steps, self.projection.size(1))
        return embedding + encoded.to(self.projection.dtype) @ self.projection.t()


def sinusoidal(steps: torch.Tensor, width: int) -> torch.Tensor:
    """e(t) of integer steps [b]: [b, width] in fp32; an odd width's last value is 0."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / max(1, half) * torch.arange(half, device=steps.device))
    angles = steps.float().unsqueeze(1) * frequencies
    encoded = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(encoded, (0, width - 2 * half))


def time_embedding(
    config: TransformerConfig, settings: ProgressiveConfig, stage: StageInfo
) -> TimeEmbedding | None:
    """The time embedding on the stage that has one."""
    return TimeEmbedding(config, settings) if stage.is_first else None
