"""A loss attached to a layer acts as if it were added to the output loss, wherever its pipeline stage is."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.auxiliary_inputs import LayerInputs
from megatron_ext.models.build_model import build_model
from megatron_ext.models.model_extension import Extension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.layout_runs import LayoutRuns, Variant
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    TINY,
    VOCAB_SIZE,
    assemble,
    synthetic_batches,
    train_tiny,
)
from megatron_ext.training.engine.step_values import LayerNames, StepValues
from megatron_ext.training.interface.family_interface import Family

WEIGHT = 30.0


def square_loss(hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
    """The loss of a layer, from 1: mean square of its output, weighted by depth."""
    return WEIGHT * layer * hidden_states.float().square().mean()


class SquareLoss(MegatronModule):
    """Attaches `square_loss` to a layer's output."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.number = layer_number

    def forward(self, hidden_states: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        """[s, b, h], unchanged."""
        loss = square_loss(hidden_states, self.number)
        return LayerLosses.attach(hidden_states, loss, f"square/layer_{self.number}")


class SquareLossExtension(Extension):
    """The loss on every layer but the last."""

    name = "square"

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """One slot."""
        return {"after_mlp": ModuleSpec(module=SquareLoss)} if layer_number + 1 < config.num_layers else {}


class SquareLossFamily(Family):
    """Nothing but the extension."""

    name = "square"

    def extension(self) -> Extension:
        """Losses on layers."""
        return SquareLossExtension()


def families() -> list[Family]:
    """One family."""
    return [SquareLossFamily()]


ByHand = tuple[float, dict[str, float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    """Output loss, losses of layers and gradients of their sum, from plain autograd on the base model."""
    return run_single(_by_hand)


def _by_hand() -> ByHand:
    initialize(ParallelConfig(), seed=1)
    model = build_model(TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)[0]
    outputs: dict[int, torch.Tensor] = {}

    def keep(module: Any, _: Any, output: Any) -> None:
        outputs[module.layer_number] = output[0]

    for layer in model.decoder.layers:
        layer.register_forward_hook(keep)
    batches = synthetic_batches(TINY.seq_length)
    output_loss, layer_losses = (
        0.0,
        dict.fromkeys(("square/layer_1", "square/layer_2", "square/layer_3"), 0.0),
    )
    for _ in range(GLOBAL_BATCH_SIZE):
        batch = next(batches)
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()
        squares = {number: square_loss(outputs[number], number) for number in (1, 2, 3)}
        ((loss + torch.stack(list(squares.values())).sum()) / GLOBAL_BATCH_SIZE).backward()
        output_loss += float(loss.detach()) / GLOBAL_BATCH_SIZE
        for number, square in squares.items():
            layer_losses[f"square/layer_{number}"] += float(square.detach()) / GLOBAL_BATCH_SIZE
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output_loss, layer_losses, gradients


_LAYOUTS = ("TP1", "TP2", "PP2", "PP2 interleaved", "DP2")
_RECOMPUTED = [f"{layout} recomputed" for layout in _LAYOUTS]
RUNS = LayoutRuns(
    {"square": Variant(make_families=families, steps=1, micro_batch_size=1)}, [*_LAYOUTS[1:], *_RECOMPUTED]
)


@pytest.mark.parametrize("layout", [*_LAYOUTS, *_RECOMPUTED])
def test_gradients_equal_those_of_the_summed_loss(layout: str, by_hand: ByHand) -> None:
    output_loss, layer_losses, gradients = by_hand
    traces = [run.trace for run in RUNS.at(layout, "square")]
    for trace in traces:
        assert trace.losses[0] == pytest.approx(output_loss, rel=1e-6)
        assert trace.layer_losses[0] == pytest.approx(layer_losses, rel=1e-5)
    found = assemble(traces)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = torch.linalg.norm(found[name] - gradient) / torch.linalg.norm(gradient)
        assert error < 1e-5, name


def test_attached_losses_dominate_the_comparison(by_hand: ByHand) -> None:
    """Without them the gradients are others, so the test above would notice their absence."""
    base = assemble([run_single(train_tiny, LAYOUTS["TP1"], 1)])
    gradient = by_hand[2]["embedding.word_embeddings.weight"]
    plain = base["embedding.word_embeddings.weight"]
    assert torch.linalg.norm(plain - gradient) > 0.1 * torch.linalg.norm(gradient)


def test_collected_losses_are_forgotten_and_evaluation_counts_without_gradients() -> None:
    after_training, in_evaluation, outside = run_single(_collect_modes)
    assert after_training == {"loss": pytest.approx(2.0)}
    assert in_evaluation == {"loss": pytest.approx(5.0)}
    assert outside == {}


def _values() -> dict[str, float]:
    return StepValues([], (), LayerNames(), of_nothing=0.0).read()[1]


def _collect_modes() -> list[dict[str, float]]:
    initialize(ParallelConfig(), seed=1)
    states = torch.zeros(2, requires_grad=True)
    for value in (1.0, 3.0):
        LayerLosses.attach(states, torch.tensor(value), "loss")
    found = [_values()]
    with torch.no_grad():
        LayerLosses.evaluating = True
        LayerLosses.attach(states, torch.tensor(5.0), "loss")
        found.append(_values())
        LayerLosses.evaluating = False
        LayerLosses.attach(states, torch.tensor(7.0), "loss")
    return [*found, _values()]
