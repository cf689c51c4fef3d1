"""The interface by which a model family extends the model.

A family can put modules into places of a layer (slots), send tensors along with the hidden states (auxiliary streams),
replace linear layers, and add one module per pipeline stage. It does not build the model: it passes an `Extension` to
`build_model`, which accepts several. Every method has a default that adds nothing.
"""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.auxiliary_inputs import AuxiliaryStream


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """Describes the part of the model that a chunk holds."""

    layer_numbers: tuple[int, ...]
    """Numbers of the chunk's layers, counted from 0 over the whole model."""

    is_first: bool
    """Whether the chunk holds the word embedding."""

    is_last: bool
    """Whether the chunk holds the final norm and the output layer."""

    owns_replicas: bool
    """Whether this chunk counts, saves and logs the parameters of which all chunks have a copy; True for the first."""


class StageModule(torch.nn.Module):
    """A model family's module on one pipeline stage; computes the auxiliary streams that the stage's layers read."""

    def embed(self, embedding: torch.Tensor, auxiliary_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the input of the first layer; called on the first stage only, before the word embedding is used.

        Args:
            embedding: the word embedding, [s, b, h] ([s/t, b, h] under sequence parallel).
            auxiliary_inputs: the batch fields that model families add, by name.

        Returns:
            A tensor of the shape of `embedding`; by default `embedding` itself.
        """
        return embedding

    def forward(
        self, auxiliary_inputs: dict[str, torch.Tensor], travelling: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Computes the model family's streams on this stage.

        Args:
            auxiliary_inputs: the families' batch fields by name, such as integer ids [b, s]; every stage gets them.
            travelling: streams received from the previous stage, each [s, b, width]. The first stage gets only the word
                embedding.

        Returns:
            The streams by name, each [s, b, width].
        """
        return {}


class Extension:
    """A model family's contribution to the model."""

    name: str
    """Name of the model's attribute that holds the stage module, and therefore the prefix of the module's parameter
    names.
    """

    bidirectional: bool = False
    """Whether every position attends to all others instead of only to earlier ones."""

    reads_layers: bool = True
    """Whether the family reads the outputs of a layer's norms, or uses a layer's weights outside of its linear
    layers.

    If False, Transformer Engine may compute norms inside linear layers, and sum gradients outside of autograd.
    """

    def streams(self, config: TransformerConfig) -> list[AuxiliaryStream]:
        """Returns the model family's streams. The model itself supplies a travelling stream named `word_embedding`."""
        return []

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Returns the family's modules for the slots of a layer, as specs by slot name. Layers are numbered from 0
        over the whole model.
        """
        return {}

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Returns replacements for a layer's linear modules, as specs by name (one of `layer_spec.LINEARS`)."""
        return {}

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> StageModule | None:
        """Returns the model family's module for one stage, or None."""
        return None
