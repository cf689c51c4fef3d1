"""NPT, neuro-plastic transformer: the attention output changes the MLP's weights, token by token.

For Python: `from megatron_ext.npt import NPTConfig, NPTModel` (or `NPTLlamaModel`), see `api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.npt.api import NPTConfig, NPTLlamaModel, NPTModel

__all__ = ["NPTConfig", "NPTLlamaModel", "NPTModel"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first asked for: the command line reads configurations without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ext.npt import api

    return getattr(api, name)
