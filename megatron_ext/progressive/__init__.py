"""Progressive growth (StackWise): a model grows by one stack of layers at a time.

Each new stack is trained on top of the trunk: the older stacks, which usually are frozen or train only LoRA adapters.

Python API: `from megatron_ext.progressive import StackWiseConfig, ProgressiveRackBuilder, ProgressiveTrainer`.
Source: docs/design/progressive_growth.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.progressive.objectives.masking import TimeStepMasking
    from megatron_ext.progressive.objectives.progressive_batches import ProgressiveDataLoader
    from megatron_ext.progressive.runs.progressive_trainer import ProgressiveTrainer
    from megatron_ext.progressive.runs.rack_builder import ProgressiveRackBuilder, create_stack_from_config
    from megatron_ext.progressive.settings.stackwise_config import StackWiseConfig

_MODULES = {
    "ProgressiveDataLoader": "objectives.progressive_batches",
    "ProgressiveRackBuilder": "runs.rack_builder",
    "ProgressiveTrainer": "runs.progressive_trainer",
    "StackWiseConfig": "settings.stackwise_config",
    "TimeStepMasking": "objectives.masking",
    "create_stack_from_config": "runs.rack_builder",
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
    # Imported on first access, because the command line reads configurations without importing torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
