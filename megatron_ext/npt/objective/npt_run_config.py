"""The configuration of an NPT run."""

from dataclasses import dataclass

from megatron_ext.config.run_config import RunConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig


@dataclass(frozen=True, kw_only=True)
class NPTRunConfig(RunConfig):
    """Configuration of an NPT run: the common config groups, `npt` (training) and `np` (the NP components)."""

    npt: NPTTrainingConfig
    """How NP components are trained: losses, curriculum and teacher."""

    np: NPTModuleConfig
    """Form, size and layers of the NP components."""
