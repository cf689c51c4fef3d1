"""Families' modules in the slots of a layer: streams, parallel layouts, recomputation, several families at once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.auxiliary_inputs import AuxiliaryStream, LayerInputs
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import WORD_EMBEDDING
from megatron_ext.models.model_extension import Extension, StageInfo, StageModule
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, assemble, train_tiny
from megatron_ext.training.interface.family_interface import Batch, Family

STEPS = 3
NOTE, TRAIL = 5, 3


class Reader(MegatronModule):
    """x + tanh([note ; trail ; ids]) W, with a weight of its own."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config)
        self.prefix = prefix
        self.tp = pg_collection.tp
        weight = torch.empty(NOTE + TRAIL + 1, config.hidden_size, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.weight.init_std = 0.1  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]."""
        streams = [layer_inputs.read(f"{self.prefix}_{name}") for name in ("note", "trail", "ids")]
        rows = len(hidden_states)
        if len(streams[2]) != rows:
            streams[2] = streams[2][self.tp.rank() * rows : (self.tp.rank() + 1) * rows]
        return hidden_states + torch.tanh(torch.cat(streams, dim=-1)) @ self.weight


class Writer(MegatronModule):
    """Leaves a part of its layer's output for the layer that follows."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config)
        self.prefix = prefix

    def forward(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        """[s, b, h], unchanged."""
        layer_inputs.write(f"{self.prefix}_note", hidden_states[..., :NOTE] * 2)
        return hidden_states


class EngineFeedForward(MegatronModule):
    """x + a + MLP(LN2(x + a)): what the engine does itself."""

    active = True

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)

    def forward(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
        layer_inputs: LayerInputs,
    ) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]."""
        hidden_states = hidden_states + attend(hidden_states)
        output = layer.mlp(layer.pre_mlp_layernorm(hidden_states))
        add = layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)
        return add(output, hidden_states, layer.hidden_dropout)


class Streams(StageModule):
    """Starts `note` and `ids` on every stage, `trail` on the first; later ones change it and send it on."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(
        self, auxiliary_inputs: dict[str, torch.Tensor], travelling: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All streams of the family."""
        embedding = travelling[WORD_EMBEDDING]
        trail = travelling.get(f"{self.prefix}_trail", embedding[..., :TRAIL].square())
        ids = (auxiliary_inputs[f"{self.prefix}_ids"].t() % 3).to(embedding.dtype).unsqueeze(-1)
        note = embedding[..., :NOTE] * 20
        return {f"{self.prefix}_note": note, f"{self.prefix}_trail": trail, f"{self.prefix}_ids": ids}


class SlotExtension(Extension):
    """Reads, and if asked to, writes and takes over the feed-forward."""

    def __init__(self, name: str, reads_in: str, *, writes: bool = False, feeds: bool = False) -> None:
        self.name, self.reads_in, self.writes, self.feeds = name, reads_in, writes, feeds

    def streams(self, config: TransformerConfig) -> list[AuxiliaryStream]:
        """Word embedding and `trail` travel; `note` and `ids` are for the layers."""
        return [
            AuxiliaryStream(name=WORD_EMBEDDING, width=config.hidden_size, to_layers=False, travels=True),
            AuxiliaryStream(name=f"{self.name}_note", width=NOTE),
            AuxiliaryStream(name=f"{self.name}_trail", width=TRAIL, travels=True),
            AuxiliaryStream(name=f"{self.name}_ids", width=1, full_sequence=True),
        ]

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """Even layers write, odd ones read what was written; without writing all read."""
        prefix = {"prefix": self.name}
        slots = {self.reads_in: ModuleSpec(module=Reader, params=prefix)}
        if self.writes:
            slots["after_mlp"] = ModuleSpec(module=Writer, params=prefix)
            if layer_number % 2 == 0:
                del slots[self.reads_in]
        if self.feeds:
            slots["feed_forward"] = ModuleSpec(module=EngineFeedForward)
        return slots

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> StageModule:
        """Without parameters."""
        return Streams(self.name)


class SlotFamily(Family):
    """A family of one extension, whose batch field is the tokens."""

    def __init__(self, extension: SlotExtension) -> None:
        self.name = extension.name
        self._extension = extension

    def extension(self) -> Extension:
        """The extension it was made with."""
        return self._extension

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`{name}_ids`."""
        return {f"{self.name}_ids": batch["tokens"]}


def reader() -> list[Family]:
    """Every layer reads, before its attention."""
    return [SlotFamily(SlotExtension("first", "before_layer"))]


def writer() -> list[Family]:
    """All three slots are taken; a layer reads what the one before it wrote."""
    return [SlotFamily(SlotExtension("first", "before_layer", writes=True, feeds=True))]


def two_families() -> list[Family]:
    """Two families in different slots."""
    second = SlotExtension("second", "after_mlp", feeds=True)
    return [SlotFamily(SlotExtension("first", "before_layer")), SlotFamily(second)]


WRITER, READER, TWO = "all slots, writing", "reading", "two families"
RUNS = LayoutRuns(
    {
        WRITER: Variant(make_families=writer, steps=STEPS),
        READER: Variant(make_families=reader, steps=STEPS),
        TWO: Variant(make_families=two_families, steps=STEPS),
    },
    [],
    {
        "TP1 recomputed": [WRITER, TWO],
        "TP2": [READER],
        "TP2 recomputed": [READER],
        "TP2+SP": [WRITER, READER],
        "TP2+SP recomputed": [WRITER, READER],
        "PP2": [WRITER, READER],
        "PP2 recomputed": [WRITER, READER, TWO],
        "PP2 interleaved": [READER],
        "PP2 interleaved recomputed": [READER, TWO],
        "TP2xPP2": [READER],
        "TP2xPP2 recomputed": [READER],
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_layers_read_what_others_wrote_and_streams_travel_with_their_gradients_at_every_layout(
    layout: str, variant: str
) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant), losses=2e-6)


@pytest.mark.parametrize("variant", RUNS.variants)
def test_every_parameter_of_the_compared_models_gets_a_gradient(variant: str) -> None:
    for name, gradient in assemble([RUNS.single(variant).trace]).items():
        assert torch.linalg.norm(gradient) > 0, name


def test_streams_change_the_model() -> None:
    """The comparisons above are of something: without the family the losses are others."""
    base, read = (run_single(train_tiny, LAYOUTS["TP1"], 1, make) for make in (list, reader))
    assert abs(base.losses[0] - read.losses[0]) > 1e-4


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_feed_forward_slot_that_does_what_the_engine_does_is_bit_equal(bf16: bool) -> None:
    with_slot, without = run_single(_feed_forward_losses, bf16)
    assert torch.equal(with_slot, without)


class FeedForwardExtension(Extension):
    """Only the feed-forward slot, no streams."""

    name = "feed"

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """The engine's own feed-forward, written out."""
        return {"feed_forward": ModuleSpec(module=EngineFeedForward)}


def _feed_forward_losses(bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of both models in training, under equal dropout."""
    model = replace(TINY, hidden_dropout=0.1, disable_bias_linear=False)
    tokens = torch.arange(32).view(2, 16)
    found = []
    for extensions in ([FeedForwardExtension()], []):
        initialize(ParallelConfig(), seed=1)
        chunk = build_model(
            model,
            ParallelConfig(),
            vocab_size=VOCAB_SIZE,
            seed=1,
            precision="bf16" if bf16 else "fp32",
            extensions=list(extensions),
        )[0]
        found.append(chunk(tokens, torch.arange(16).expand_as(tokens), None, labels=tokens).detach())
    return found[0], found[1]


def test_two_families_in_one_slot_are_refused() -> None:
    message = run_single(_error_of_one_slot)
    assert (
        message == "layer 0: the model family 'second' uses the slot 'before_layer', which "
        "another model family already uses; apply the two families to different layers"
    )


def _error_of_one_slot() -> str:
    initialize(ParallelConfig(), seed=1)
    extensions: list[Extension] = [SlotExtension(name, "before_layer") for name in ("first", "second")]
    with pytest.raises(ValueError, match="uses the slot") as error:
        build_model(TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    return str(error.value)


def test_widths_of_all_families_add_up_and_a_stream_that_several_want_travels_once() -> None:
    # The word embedding is as wide as the hidden states; the two short streams share another row of that width.
    assert run_single(_pipeline_factor) == 1 + 1 + 1


def _pipeline_factor() -> int:
    initialize(ParallelConfig(), seed=1)
    extensions = [family.extension() for family in two_families()]
    chunk = build_model(TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)[0]
    return chunk.auxiliary.pipeline_factor(TINY.hidden_size)
