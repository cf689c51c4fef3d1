"""What a family adds to a model: slot modules, auxiliary streams, one module per pipeline stage.

A family does not build the model; it hands an `Extension` to `models.build`. Several extensions form one model.
Every method has a default that adds nothing.
"""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.auxiliary_inputs import AuxiliaryStream


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """The part of the model that one chunk holds."""

    layer_numbers: tuple[int, ...]
    """Global numbers of its layers, from 0."""

    is_first: bool
    """It holds the word embedding."""

    is_last: bool
    """It holds the final norm and the output layer."""

    owns_replicas: bool
    """It is the chunk that counts, saves and logs what is replicated over all chunks (the first one)."""


class StageModule(torch.nn.Module):
    """A family's module on one pipeline stage: makes the auxiliary streams that the stage's layers read."""

    def embed(self, embedding: torch.Tensor, auxiliary_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the first layer gets; called on the first stage, before anything reads the word embedding.

        Args:
            embedding: [s, b, h], [s/t, b, h] under sequence parallel.
            auxiliary_inputs: the family's batch fields.
        """
        return embedding

    def forward(
        self, auxiliary_inputs: dict[str, torch.Tensor], travelling: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Values for the family's streams.

        Args:
            auxiliary_inputs: the family's batch fields on every stage, such as integer ids [b, s].
            travelling: streams from the stage before (and, on the first stage, those it starts), [s, b, width].
        """
        return {}


class Extension:
    """A family's contribution to the model."""

    name: str
    """Attribute of the model under which the stage module lives, and prefix of its parameters."""

    bidirectional: bool = False
    """Every position attends to all others, not only to those before it."""

    def streams(self, config: TransformerConfig) -> list[AuxiliaryStream]:
        """Side streams of the family. A travelling stream named `word_embedding` is started by the model itself."""
        return []

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Slot name -> module spec for a layer (numbered from 0 over the whole model)."""
        return {}

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """What takes the place of a layer's own linear modules, by their names in `spec.LINEARS`."""
        return {}

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> StageModule | None:
        """The family's module for one stage, or None."""
        return None
