"""NPT, neuro-plastic transformer: the attention output applies a low-rank update to the MLP's weights, per token.

Python API: `from megatron_ext.npt import NPTConfig, NPTModel` (or `NPTLlamaModel`); see `runs/npt_model.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.npt.runs.npt_model import NPTConfig, NPTLlamaModel, NPTModel

__all__ = ["NPTConfig", "NPTLlamaModel", "NPTModel"]


def __getattr__(name: str) -> Any:
    # Imported on first access, because the command line reads configurations without importing torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ext.npt.runs import npt_model

    return getattr(npt_model, name)
