"""The families a checkpoint may hold, by the name under which it holds them. For tools that serve all of them."""

from typing import TYPE_CHECKING, Any

from megatron_ext.inference.perplexity import Begin
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.progressive.objectives.unmasking import objective_of
from megatron_ext.progressive.progressive_family import ProgressiveFamily

if TYPE_CHECKING:
    from megatron_ext.inference.load_model import LoadedModel

FAMILIES: dict[str, type[Any]] = {
    family.name: family for family in (PerLayerFamily, NPTFamily, ProgressiveFamily)
}
"""Family's name -> class with `from_configuration`."""


def window_begin(loaded: "LoadedModel") -> Begin | None:
    """The token with which an evaluation begins a model's windows, None for none.

    A model that sees what lies ahead is asked for tokens of the window itself, so nothing is put there.
    """
    objective = objective_of(loaded.families)
    if objective is not None and objective.bidirectional:
        return None
    tokenizer = loaded.tokenizer
    if not tokenizer.adds_bos or tokenizer.bos is None:
        return None
    return Begin(token=tokenizer.bos, ends_documents=tokenizer.bos == tokenizer.eod)
