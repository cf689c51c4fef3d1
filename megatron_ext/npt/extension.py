"""NPT as the model sees it: the feed-forward slot of the chosen layers. No streams, nothing on a stage."""

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.extension import Extension
from megatron_ext.npt.config import NPTModuleConfig
from megatron_ext.npt.feed_forward import NPFeedForward


class NPTExtension(Extension):
    """NP components in the layers that `--npt-layers` names."""

    name = "npt"

    def __init__(self, settings: NPTModuleConfig) -> None:
        """Args:
        settings: NPT's configuration.
        """
        self.settings = settings

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """The feed-forward of a chosen layer.

        Raises:
            ValueError: the layers or the target do not fit the model.
        """
        self.settings.check_model(config.gated_linear_unit)
        if layer_number not in self.settings.layers(config.num_layers):
            return {}
        return {"feed_forward": ModuleSpec(module=NPFeedForward, params={"settings": self.settings})}
