"""A family of adapted layers for tests: a plan put into a model, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.lora.parallel_linear import LayerSettings, linear_modules
from megatron_ext.lora.trainable_layers import adapted_linears, prepare_layers
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import initialize_parameters
from megatron_ext.models.model_extension import Extension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family

MODEL = replace(TINY, init_method_std=0.1, untie_embeddings_and_output_weights=True)
STACK = AdapterShape(rank=4, alpha=8)
PROGRESSIVE = AdapterShape(rank=2, alpha=3)
DUAL = LayerSettings(
    adapters={"stack": STACK, "progressive": PROGRESSIVE},
    trained_adapters=frozenset({"stack", "progressive"}),
    trains_base=False,
)


class AdaptedExtension(Extension):
    """The plan's linear layers."""

    name = "adapted"
    reads_layers = False

    def __init__(self, plan: Mapping[int, LayerSettings]) -> None:
        self.plan = plan

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        return linear_modules(self.plan[layer_number]) if layer_number in self.plan else {}


class AdaptedFamily(Family):
    """The plan in a training run."""

    name = "adapted"

    def __init__(self, plan: Mapping[int, LayerSettings], b_std: float) -> None:
        self.plan = plan
        self.b_std = b_std

    def extension(self) -> AdaptedExtension:
        return AdaptedExtension(self.plan)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        draw_b(chunks, self.b_std)
        prepare_layers(chunks, self.plan)


@dataclass(frozen=True)
class MakeAdapted:
    """Makes the families of a run; travels to the processes by pickle."""

    plan: Mapping[int, LayerSettings] = field(default_factory=lambda: dict.fromkeys(range(4), DUAL))
    b_std: float = 0.1

    def __call__(self) -> list[Family]:
        return [AdaptedFamily(self.plan, self.b_std)]


def draw_b(chunks: list[GPTModel], std: float) -> None:
    """Gives the adapters' B values, which do not depend on the parallel layout; A's gradient is zero while B is."""
    for _, _, linear in adapted_linears(chunks):
        for adapter in linear.adapters.values():
            adapter.B.init_std = std  # type: ignore[union-attr]
    for chunk in chunks:
        initialize_parameters(chunk, seed=1, std=MODEL.init_method_std, num_layers=MODEL.num_layers)


def build(
    plan: Mapping[int, LayerSettings],
    parallel: ParallelConfig | None = None,
    *,
    model: ModelConfig = MODEL,
    b_std: float = 0.1,
    precision: Precision = "fp32",
) -> list[GPTModel]:
    """The plan's model, ready for use; in every process of the layout."""
    parallel = parallel or ParallelConfig()
    initialize(parallel, seed=1)
    extensions: list[Extension] = [AdaptedExtension(plan)]
    chunks = build_model(
        model,
        parallel,
        vocab_size=VOCAB_SIZE,
        seed=1,
        precision=precision,
        extensions=extensions,
    )
    draw_b(chunks, b_std)
    prepare_layers(chunks, plan)
    return chunks


def some_tokens(batch: int = 2, length: int = MODEL.seq_length) -> torch.Tensor:
    """Token ids [b, s]."""
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_of(chunk: GPTModel) -> torch.Tensor:
    """Logits [b, s, V(/t)] of `some_tokens` from a model that is one chunk."""
    tokens = some_tokens()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    return chunk(tokens, positions, None).detach()
