"""Lists the model families that a checkpoint may contain, for tools that open any checkpoint."""

from typing import TYPE_CHECKING, Any

from megatron_ext.adapters.adapter_family import AdapterFamily
from megatron_ext.inference.perplexity import Begin
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.progressive.objectives.unmasking import objective_of
from megatron_ext.progressive.progressive_family import ProgressiveFamily

if TYPE_CHECKING:
    from megatron_ext.inference.load_model import LoadedModel

FAMILIES: dict[str, type[Any]] = {
    family.name: family for family in (PerLayerFamily, NPTFamily, ProgressiveFamily, AdapterFamily)
}
"""Maps the name of a model family in a checkpoint to the family's class, which has a method `from_configuration`."""


def window_begin(loaded: "LoadedModel") -> Begin | None:
    """Returns the token that every evaluation window of this model begins with, or None."""
    objective = objective_of(loaded.families)
    if objective is not None and objective.bidirectional:
        # A bidirectional model predicts masked tokens from all other tokens of the window, so it needs no token in
        # front.
        return None
    tokenizer = loaded.tokenizer
    if not tokenizer.adds_bos or tokenizer.bos is None:
        return None
    return Begin(token=tokenizer.bos, ends_documents=tokenizer.bos == tokenizer.eod)
