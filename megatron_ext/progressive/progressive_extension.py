"""Adds the parts of progressive training to the model: adapters, bidirectional attention, and the time embedding."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.lora.parallel_linear import SettingsByLayer, linear_modules
from megatron_ext.models.model_extension import Extension, StageInfo
from megatron_ext.progressive.objectives.time_embedding import TimeEmbedding, time_embedding
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


class ProgressiveExtension(Extension):
    """Gives linear layers adapters or another precision, and adds the parts that the objective requires."""

    name = "progressive"
    reads_layers = False

    def __init__(self, plan: SettingsByLayer, config: ProgressiveConfig) -> None:
        """Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        config: the configuration of progressive training, which names the objective and the time embedding.
        """
        self.plan = plan
        self.config = config
        self.bidirectional = config.bidirectional

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Returns the four linear modules of a layer, or an empty dict if megatron-core's own modules suffice."""
        settings = self.plan[layer_number]
        return linear_modules(settings) if settings.changes_linears(config.params_dtype) else {}

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> TimeEmbedding | None:
        """Returns the time embedding on the first stage, if time is an input of the model."""
        return time_embedding(config, self.config, stage) if self.config.embeds_time else None
