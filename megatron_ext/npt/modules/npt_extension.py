"""NPT's extension of the model: a feed-forward module in the chosen layers, and a stream with the teacher's hidden
states.
"""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.auxiliary_inputs import AuxiliaryStream
from megatron_ext.models.model_extension import Extension, StageInfo, StageModule
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.teacher_inputs import TEACHER, TeacherInputs


class NPTExtension(Extension):
    """Adds NP components (the factors that generate weight updates) to the layers that `--npt-layers` names."""

    name = "npt"

    def __init__(self, settings: NPTModuleConfig) -> None:
        """Args:
        settings: NPT's configuration.
        """
        self.settings = settings

    def streams(self, config: TransformerConfig) -> list[AuxiliaryStream]:
        """Returns the stream with the teacher's hidden states. Its width varies, because only some steps need these
        states.
        """
        return [AuxiliaryStream(name=TEACHER, width=None)]

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Returns the NP feed-forward module for a layer that `--npt-layers` names, and an empty dict for other layers.

        Raises:
            ValueError: the layers or the target do not fit the model.
        """
        self.settings.check_model(config.gated_linear_unit)
        if layer_number not in self.settings.layers(config.num_layers):
            return {}
        return {"feed_forward": ModuleSpec(module=NPFeedForward, params={"settings": self.settings})}

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> StageModule | None:
        """Returns the module that makes the stream of the teacher's states; None for a stage without NPT layers."""
        chosen = self.settings.layers(config.num_layers)
        layers = tuple(number for number in stage.layer_numbers if number in chosen)
        return TeacherInputs(layers) if layers else None
