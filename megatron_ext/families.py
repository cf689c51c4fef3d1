"""The families a checkpoint may hold, by the name under which it holds them. For tools that serve all of them."""

from typing import Any

from megatron_ext.npt.family import NPTFamily
from megatron_ext.per_layer.family import PerLayerFamily
from megatron_ext.progressive.family import ProgressiveFamily

FAMILIES: dict[str, type[Any]] = {
    family.name: family for family in (PerLayerFamily, NPTFamily, ProgressiveFamily)
}
"""Family's name -> class with `from_configuration`."""
