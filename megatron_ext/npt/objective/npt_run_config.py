"""The configuration of an NPT run, and the defaults of other config groups that depend on --mode.

The command line reads this file, so it must not import torch.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.run_config import RunConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.npt_training_config import STEPS_PER_LAYER, NPTTrainingConfig


@dataclass(frozen=True, kw_only=True)
class NPTRunConfig(RunConfig):
    """Configuration of an NPT run: the common config groups, `npt` (training) and `np` (the NP components)."""

    npt: NPTTrainingConfig
    """Training of the NP components: losses, curriculum and teacher."""

    np: NPTModuleConfig
    """Form, size and layers of the NP components."""


_OUTER_PRODUCT = {"np_form": "outer_product", "np_rank": 256}
_MODULE_DEFAULTS = dict.fromkeys(("single_layer", "sequential", "multi_layer"), _OUTER_PRODUCT)
"""Maps a mode to the fields of `NPTModuleConfig` with defaults that differ in this mode."""


def mode_defaults(given: Mapping[str, Any]) -> Found:
    """Returns the defaults that depend on the mode.

    Args:
        given: values set on the command line or in the YAML file, by field name.
    """
    mode = given.get("mode", NPTTrainingConfig.mode)
    sections: dict[str, dict[str, Any]] = {"np": _MODULE_DEFAULTS.get(mode, {})}
    if mode == "sequential":
        length = {"train_iters": given.get("steps_per_layer", STEPS_PER_LAYER)}
        folder = f"experiments/sequential_checkpoint_{time.strftime('%Y%m%d_%H%M%S')}"
        sections |= {
            "training": {
                "micro_batch_size": 2,
                **({} if given.keys() & {"train_samples", "num_epochs"} else length),
            },
            "optimizer": {"lr": 5e-4},
            "checkpoint": {"save": folder},
        }
    return Found(f"--mode {mode}", sections)
