"""NPT's part in a training run: its part of the model, the frozen base, its cost."""

from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.serialize import configs_from_dict, configs_to_dict
from megatron_ext.models.accounting import ModelCost
from megatron_ext.models.base_parameters import base_parameters
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.accounting import npt_cost
from megatron_ext.npt.config import NPTModuleConfig
from megatron_ext.npt.extension import NPTExtension
from megatron_ext.training.family import Family


class NPTFamily(Family):
    """NP components in a run."""

    name = "npt"

    free_on_resume = frozenset({"np_init_scale", "np_init_strategy"})

    def __init__(self, settings: NPTModuleConfig) -> None:
        """Args:
        settings: NPT's configuration.
        """
        self.settings = settings

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> "NPTFamily":
        """The family that gave this `configuration()`."""
        return cls(configs_from_dict({"settings": NPTModuleConfig}, configuration)["settings"])

    def configuration(self) -> dict[str, Any]:
        """NPT's settings."""
        return dict(configs_to_dict({"settings": self.settings}))

    def extension(self) -> NPTExtension:
        """NPT's part of the model."""
        return NPTExtension(self.settings)

    def cost(self, model: ModelConfig) -> ModelCost:
        """Parameters and FLOPs that NPT adds to `model`."""
        return npt_cost(self.settings, model)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Freezes the base model, unless `--no-freeze-base`; other families' modules are left alone."""
        if self.settings.freeze_base:
            for chunk in chunks:
                for parameter in base_parameters(chunk):
                    parameter.requires_grad_(False)
