"""Progressive (StackWise): a model grown stack by stack over a frozen or LoRA trunk. Source: document 004.

For Python: `from megatron_ext.progressive import StackWiseConfig, ProgressiveRackBuilder, ProgressiveTrainer`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.progressive.builder import ProgressiveRackBuilder, create_stack_from_config
    from megatron_ext.progressive.data_loader import ProgressiveDataLoader
    from megatron_ext.progressive.masking import TimeStepMasking
    from megatron_ext.progressive.stackwise_config import StackWiseConfig
    from megatron_ext.progressive.trainer import ProgressiveTrainer

_MODULES = {
    "ProgressiveDataLoader": "data_loader",
    "ProgressiveRackBuilder": "builder",
    "ProgressiveTrainer": "trainer",
    "StackWiseConfig": "stackwise_config",
    "TimeStepMasking": "masking",
    "create_stack_from_config": "builder",
}

__all__ = [
    "ProgressiveDataLoader",
    "ProgressiveRackBuilder",
    "ProgressiveTrainer",
    "StackWiseConfig",
    "TimeStepMasking",
    "create_stack_from_config",
]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first asked for: the command line reads configurations without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
