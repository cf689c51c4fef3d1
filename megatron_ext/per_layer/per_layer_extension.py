"""Adds per-layer embedding (PLE) to the model: two auxiliary streams, a block per layer and a module per stage.

Auxiliary streams are tensors that accompany the hidden states. The word embedding travels from stage to stage; every
stage computes the per-layer vectors of its own layers.
"""

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ext.models.auxiliary_inputs import AuxiliaryStream
from megatron_ext.models.gpt_model import WORD_EMBEDDING
from megatron_ext.models.model_extension import Extension, StageInfo
from megatron_ext.per_layer.per_layer_block import PerLayerBlock
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_inputs import PER_LAYER_STREAM, PerLayerInputs


class PerLayerExtension(Extension):
    """Adds per-layer embedding to every layer."""

    name = "per_layer"
    reads_layers = False

    def __init__(self, settings: PerLayerConfig, rows: int) -> None:
        """Args:
        settings: PLE's configuration.
        rows: Vp, the number of rows of every table (`PerLayerConfig.rows`).
        """
        self.settings = settings
        self.rows = rows

    def streams(self, config: TransformerConfig) -> list[AuxiliaryStream]:
        """Returns two streams: the word embedding, and the per-layer vectors of the stage's layers as one tensor.

        The word embedding travels from stage to stage. The tensor of a stage is [L, s, b, p / t], for its L layers.

        Raises:
            ValueError: the tensor-parallel size does not divide the per-layer hidden size.
        """
        self.settings.check_layout(config.tensor_model_parallel_size)
        width = self.settings.per_layer_hidden_size // config.tensor_model_parallel_size
        return [
            AuxiliaryStream(name=WORD_EMBEDDING, width=config.hidden_size, to_layers=False, travels=True),
            AuxiliaryStream(name=PER_LAYER_STREAM, width=stage_layers(config) * width, full_sequence=True),
        ]

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Maps the slot that `--per-layer-position` names to PLE's block."""
        layers = stage_layers(config)
        # Chunks of the interleaved schedule have equally many layers; otherwise a stage has one chunk.
        virtual = config.virtual_pipeline_model_parallel_size
        part = layer_number - first_layer(config) if virtual is None else layer_number % layers
        params = {"settings": self.settings, "part": part, "parts": layers}
        return {self.settings.per_layer_position: ModuleSpec(module=PerLayerBlock, params=params)}

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> PerLayerInputs:
        """Returns the module with the tables and projections of the stage's layers."""
        return PerLayerInputs(config, self.settings, stage, pg_collection, self.rows)


def stage_layers(config: TransformerConfig) -> int:
    """Returns the number of layers of this rank's stage (of each of its chunks with the interleaved schedule)."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return get_num_layers_to_build(config, _first_chunk(config), rank)


def first_layer(config: TransformerConfig) -> int:
    """Returns the index in the whole model, from 0, of the first layer of this rank's stage."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return get_transformer_layer_offset(config, _first_chunk(config), rank)


def _first_chunk(config: TransformerConfig) -> int | None:
    return None if config.virtual_pipeline_model_parallel_size is None else 0
