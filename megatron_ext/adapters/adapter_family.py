"""The model family for LoRA: every linear module in the layers gets an adapter, and the loaded model is frozen.

    y = W x + (alpha / r) B A x                    W frozen, A and B trained          (arXiv 2106.09685)

If the run adds model families that the loaded model lacks, such as PLE, their modules train together with the
adapters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_in, group_to_dict
from megatron_ext.interop.peft_export import write_adapters
from megatron_ext.lora.adapter_config import AdapterConfig
from megatron_ext.lora.adapter_cost import adapted_activations, adapted_work, adapter_parameters
from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.lora.parallel_linear import LayerSettings, linear_modules
from megatron_ext.lora.trainable_layers import merge_adapters
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.model_extension import Extension
from megatron_ext.training.interface.family_interface import Family

ADAPTER = "lora"
"""Name of the adapter in every linear module, and of the directory to which the adapters are exported."""


class AdapterExtension(Extension):
    """Replaces the linear modules of every layer by linear modules with an adapter."""

    name = "lora"
    reads_layers = False

    def __init__(self, settings: LayerSettings) -> None:
        """Args:
        settings: the adapters of every layer, and which parts of the layer are frozen.
        """
        self.settings = settings

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Returns the four linear modules of a layer, with their adapters."""
        return linear_modules(self.settings)


class AdapterFamily(Family):
    """LoRA adapters for a frozen model. Must be last in the run's list of families, because it also freezes the modules
    of those families that the loaded model already has.
    """

    name = "lora"

    def __init__(self, settings: AdapterConfig, trained: Sequence[Family] = ()) -> None:
        """Args:
        settings: rank and alpha.
        trained: the model families that the loaded model lacks; their modules train.
        """
        assert settings.lora_rank is not None, "LoRA requires a rank"
        self.settings = settings
        self.trained = trained
        self.shape = AdapterShape(rank=settings.lora_rank, alpha=settings.lora_alpha)
        self.of_a_layer = LayerSettings(
            adapters={ADAPTER: self.shape}, trained_adapters=frozenset({ADAPTER}), trains_base=False
        )

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> "AdapterFamily":
        """Rebuilds the model family from the result of `configuration()`."""
        return cls(group_in(AdapterConfig, configuration, "settings"))

    def configuration(self) -> dict[str, Any]:
        """Returns rank and alpha as JSON values."""
        return {"settings": group_to_dict(self.settings)}

    def extension(self) -> AdapterExtension:
        """Returns the linear modules with adapters."""
        return AdapterExtension(self.of_a_layer)

    def cost(self, model: ModelConfig) -> ModelCost:
        """Returns the parameters and FLOPs of the adapters."""
        parameters = adapter_parameters(self._plan(model), model)
        return ModelCost(parameters=parameters, forward_flops_per_token=2.0 * parameters)

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork:
        """Returns the FLOPs of a step in which only adapters train."""
        work = adapted_work(self._plan(model), model, trains_embedding=bool(self.trained))
        return replace(work, head=Use.GRADIENT, trains_embedding=False)

    def activations(self, layout: ParallelLayout, iteration: int) -> FamilyActivations:
        """Returns the activation memory that the adapters add to a step, in bytes."""
        return adapted_activations(self._plan(layout.model), layout)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Freezes all parameters except the adapters and the modules of the families that train."""
        for chunk in chunks:
            kept = tuple(self._trained_modules(chunk))
            for name, parameter in chunk.named_parameters():
                if ADAPTERS not in name.split(".") and not name.startswith(kept):
                    parameter.requires_grad_(False)

    def _trained_modules(self, chunk: GPTModel) -> Iterator[str]:
        """Yields, for each module of a trained family in a chunk, the prefix of its parameters' names."""
        for family in self.trained:
            yield f"{family.name}."
            for place, number in enumerate(chunk.stage.layer_numbers):
                for slot in family.extension().slots(chunk.config, number):
                    yield f"decoder.layers.{place}.{slot}."

    def check_plain(self, *, as_adapters: bool) -> None:
        """Accepts both exports: adapters can be merged, and can be written as adapters."""

    def merge(self, chunks: list[GPTModel]) -> list[str]:
        """Adds every adapter to its base weight."""
        merge_adapters(chunks)
        return []

    def write_adapters(
        self, chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
    ) -> list[str]:
        """Writes the adapters to a directory that the library `peft` can load."""
        return write_adapters(chunks, model, directory, base_model, overwrite=overwrite)

    def _plan(self, model: ModelConfig) -> dict[int, LayerSettings]:
        return dict.fromkeys(range(model.num_layers), self.of_a_layer)
