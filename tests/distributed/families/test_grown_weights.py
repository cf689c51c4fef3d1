"""Growth: where weights and optimizer states go, what a new stack begins with, what moves, and that nothing is lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA, parameter_shards
from megatron_ext.platform.process_groups import initialize
from megatron_ext.progressive.growth.grown_weights import layer_of_name
from megatron_ext.progressive.growth.rack import rack_of
from megatron_ext.progressive.progressive_family import ProgressiveFamily, Trunk
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import load_weights
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.optimizer import build_optimizer
from tests.integration.progressive.progressive_run_helpers import (
    VOCABULARY,
    losses_of,
    stored,
    train,
    write_data,
)

STEPS = ("--stack-steps", "2")
CONFIG = ProgressiveConfig(
    training_objective="clm", n_blocks=(2,), target_stacks=2, qlora_rank=4, progressive_qlora_rank=2
)
TRUNK = replace(
    TINY, num_layers=2, ffn_hidden_size=None, init_method_std=0.1, untie_embeddings_and_output_weights=True
)
"""What `run_helpers` trains."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def layer(tensors: Tensors, number: int, *, adapters: bool = True) -> Tensors:
    """A layer's model tensors by their names in it."""
    prefix = f"decoder.layers.{number}."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and (adapters or ".adapters." not in name) and "_extra_state" not in name
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def grow_prepended_and_appended(data: str, folder: str) -> tuple[list[Tensors], list[float]]:
    """Stack 0, stack 1 before it, stack 2 after both; the checkpoints, and the losses around growth."""
    mode = ("--building-mode", "prepend", "append", "--growth-init", "zero", *STEPS)
    _, output = train(data, folder, *mode, "--target-stacks", "3")
    return [stored(folder, f"progressive_stack_{i}") for i in range(3)], losses_of(output)


@pytest.fixture(scope="module")
def grown(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensors], list[float]]:
    folder = str(tmp_path_factory.mktemp("grown"))
    found: tuple[list[Tensors], list[float]] = run_single(grow_prepended_and_appended, data, folder)
    return found


def test_each_trunk_layer_is_where_it_belongs_and_has_not_moved_by_a_bit(
    grown: tuple[list[Tensors], list[float]],
) -> None:
    first, second, third = grown[0]
    places_in_second, places_in_third = {0: 2, 1: 3}, {0: 0, 1: 1, 2: 2, 3: 3}
    for old, new in places_in_second.items():
        assert_same(layer(second, new), layer(first, old))
    for old, new in places_in_third.items():
        assert_same(layer(third, new), layer(second, old))


def test_the_embedding_stays_while_head_and_final_norm_train(
    grown: tuple[list[Tensors], list[float]],
) -> None:
    first, second, third = grown[0]
    for before, after in ((first, second), (second, third)):
        name = "embedding.word_embeddings.weight"
        assert torch.equal(before[name], after[name])
        for name in ("output_layer.weight", "decoder.final_layernorm.weight"):
            assert not torch.equal(before[name], after[name])


def test_new_layers_train_and_differ_from_other_stacks_at_the_same_place(
    grown: tuple[list[Tensors], list[float]],
) -> None:
    first, second, third = grown[0]
    assert layer(third, 4)["mlp.linear_fc2.weight"].abs().max() > 0
    assert not torch.allclose(
        layer(second, 0)["mlp.linear_fc1.weight"], layer(first, 0)["mlp.linear_fc1.weight"], atol=0.05
    )


def test_trunk_has_progressive_adapters_from_the_first_growth_after_it(
    grown: tuple[list[Tensors], list[float]],
) -> None:
    def adapters(tensors: Tensors, number: int) -> set[str]:
        return {name.split(".")[-2] for name in layer(tensors, number) if ".adapters." in name}

    first, second, third = grown[0]
    assert adapters(first, 0) == {"stack"}
    assert [adapters(second, number) for number in (0, 2)] == [{"stack"}, {"stack", "progressive"}]
    assert [adapters(third, number) for number in (0, 2, 4)] == [
        {"stack", "progressive"},
        {"stack", "progressive"},
        {"stack"},
    ]


LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "DP2": ("--use-distributed-optimizer",),
}


def grow_at_layouts(data: str, folder: str) -> dict[str, tuple[list[float], Tensors, Tensors]]:
    results = {}
    flags = ("--building-mode", "prepend", "append", "--growth-init", "zero", *STEPS, "--target-stacks", "3")
    for name in ("TP2", "PP2"):
        layout = LAYOUTS[name]
        save = f"{folder}/{name}"
        _, output = train(data, save, *flags, *layout)
        results[name] = (
            losses_of(output),
            stored(save, "progressive_stack_0"),
            stored(save, "progressive_stack_1"),
        )
    outputs = [
        train(data, f"{folder}/changing", *flags, "--target-stacks", str(target), *layout)[1]
        for target, layout in enumerate(LAYOUTS.values(), start=1)
    ]
    losses = [loss for output in outputs for loss in losses_of(output)]
    phases = [stored(f"{folder}/changing", f"progressive_stack_{i}") for i in range(2)]
    results["another layout for every stack"] = losses, phases[0], phases[1]
    return results


@pytest.fixture(scope="module")
def at_layouts(
    data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[float], Tensors, Tensors]]:
    folder = str(tmp_path_factory.mktemp("layouts"))
    found: dict[str, Any] = run_distributed(grow_at_layouts, 2, data, folder)[0]
    return found


@pytest.mark.parametrize("layout", ["TP2", "PP2", "another layout for every stack"])
def test_growth_at_every_parallel_layout_equals_the_single_process(
    at_layouts: dict[str, tuple[list[float], Tensors, Tensors]],
    grown: tuple[list[Tensors], list[float]],
    layout: str,
) -> None:
    losses, first, second = at_layouts[layout]
    assert losses == pytest.approx(grown[1], rel=2e-4)
    for old, new in {0: 2, 1: 3}.items():
        assert_same(layer(second, new), layer(first, old))


def head_and_new_layer(data: str, folder: str) -> tuple[str, torch.Tensor, torch.Tensor, dict[str, int]]:
    """Two stacks, and what the second one's optimizer began with."""
    _, output = train(data, folder, *STEPS, "--target-stacks", "2")
    chunks, families = grown_model(folder, growth_init="random")
    wrapped = wrap_model(chunks, ParallelConfig())
    optimizer = build_optimizer(OptimizerSettings(lr=1e-3), ParallelConfig(), wrapped, families)
    families[0].carry_optimizer_state(chunks, optimizer)
    state = optimizer.chained_optimizers[0].optimizer.state
    head, new = chunks[0].output_layer.weight, chunks[0].decoder.layers[3].mlp.linear_fc2.weight
    counts = {"head": int(state[head]["step"]), "new layer": int(state[new]["step"])}
    stored_moment = stored(folder, "progressive_stack_0")["optimizer.state.exp_avg.output_layer.weight"]
    return output, stored_moment, state[head]["exp_avg"], counts


def test_a_learning_rate_schedule_starts_again_with_every_stack_while_optimizer_states_go_on(
    data: str, tmp_path: Path
) -> None:
    output, before, after, counts = run_single(head_and_new_layer, data, str(tmp_path))
    assert output.count("lr 1.000e-02") == 2
    assert before.abs().max() > 0
    assert torch.equal(before, after)
    assert counts == {"head": 2, "new layer": 0}


def logits_before_and_after(data: str, folder: str) -> dict[str, torch.Tensor]:
    """Logits of a trained stack, and of models that have just grown from it."""
    train(data, folder, *STEPS, "--target-stacks", "1")
    config = replace(CONFIG, target_stacks=1)
    family = ProgressiveFamily(config, rack_of(config, 1))
    chunks = build_model(
        TRUNK, ParallelConfig(), vocab_size=VOCABULARY, seed=9, extensions=[family.extension()]
    )
    load_weights(f"{folder}/progressive_stack_0", list(chunks), [family], vocab_size=VOCABULARY)
    found = {"trunk": logits(chunks[0])}
    for mode in ("append", "prepend"):
        for how in ("zero", "random"):
            grown_chunks, _ = grown_model(folder, growth_init=how, building_mode=(mode,))
            found[f"{mode} {how}"] = logits(grown_chunks[0])
    return found


def test_zero_growth_leaves_the_logits_exactly_as_they_were(data: str, tmp_path: Path) -> None:
    found = run_single(logits_before_and_after, data, str(tmp_path))
    for mode in ("append", "prepend"):
        assert torch.equal(found[f"{mode} zero"], found["trunk"])
        assert not torch.allclose(found[f"{mode} random"], found["trunk"], atol=1e-2)


def copies(data: str, folder: str, world_size: int) -> dict[str, Any]:
    """What a stack of three layers has that grew from two, by the way of growth."""
    flags = ("--target-stacks", "1", *STEPS, "--tensor-model-parallel-size", str(world_size))
    train(data, folder, *flags)
    found: dict[str, Any] = {"trunk": stored(folder, "progressive_stack_0")}
    for how in ("copy", "interleave"):
        parallel = ParallelConfig(tensor_model_parallel_size=world_size)
        chunks, _ = grown_model(folder, growth_init=how, n_blocks=(2, 3), parallel=parallel)
        shards = [
            (shard.key, shard.global_offset, shard.data.detach().clone())
            for _, shard in parameter_shards(chunks[0].sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)))
        ]
        found[how] = shards
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_copied_layers_have_the_weights_and_the_adapters_product_of_their_sources(
    data: str, tmp_path: Path, world_size: int
) -> None:
    ranks = run_distributed(copies, world_size, data, str(tmp_path), world_size)
    trunk = ranks[0]["trunk"]
    sources = {"copy": {2: 0, 3: 1, 4: 0}, "interleave": {2: 0, 3: 0, 4: 1}}
    for how, pairs in sources.items():
        for key, offset, values in (shard for rank in ranks for shard in rank[how]):
            number = layer_of_name(key)
            if number not in pairs or ".adapters." in key:
                continue
            source = key.replace(f"layers.{number}.", f"layers.{pairs[number]}.")
            expected = trunk[source].double()
            factors = source.removesuffix("weight") + "adapters.stack."
            if f"{factors}A" in trunk:
                expected = expected + 32 / 4 * trunk[f"{factors}B"].double() @ trunk[f"{factors}A"].double()
            part = expected[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
            torch.testing.assert_close(values.double(), part, atol=1e-6, rtol=1e-5)


def grown_model(folder: str, parallel: ParallelConfig | None = None, **changes: Any) -> tuple[Any, Any]:
    """A model of two stacks that has just grown from the first stack's checkpoint, and its families."""
    parallel = parallel or ParallelConfig()
    config = replace(CONFIG, **changes)
    where = find_checkpoint(f"{folder}/progressive_stack_0")
    assert where is not None
    initialize(parallel, seed=1)
    trunk = Trunk(folder=where, rack=rack_of(config, 1), trains="newest")
    rack = rack_of(config, 2)
    family = ProgressiveFamily(config, rack, "newest", trunk=trunk)
    model = replace(TRUNK, num_layers=rack.num_layers)
    chunks = build_model(model, parallel, vocab_size=VOCABULARY, seed=1, extensions=[family.extension()])
    family.prepare_model(chunks)
    return chunks, [family]


def logits(chunk: GPTModel) -> torch.Tensor:
    """Of fixed tokens."""
    tokens = torch.arange(32).view(2, 16)
    chunk.eval()
    return chunk(tokens, torch.arange(16).expand_as(tokens), None).detach()
