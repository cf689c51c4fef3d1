"""Document 004's Python API: its own examples, run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.data.datasets.sample_ids import sample_ids
from megatron_ext.platform import process_groups
from megatron_ext.progressive import (
    ProgressiveDataLoader,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
    TimeStepMasking,
    create_stack_from_config,
)
from megatron_ext.testing.run_single import run_single

DOCUMENT = """
model: {vocab_size: 60, d_model: 32, d_ff: 48, n_heads: 4, seq_length: 16}
training:
  progressive:
    enabled: true
    trunk_strategy: "frozen"
    new_stack_precision: "full"
    cache_activations: true
    qlora_enabled: true
    qlora_rank: 16
    qlora_alpha: 32
    qlora_strategy: "simplified"
    progressive_qlora: true
    progressive_qlora_rank: 8
    progressive_qlora_alpha: 16
    max_stacks: 12
    building_mode: "append"
    time_interpretation: "depth"
    time_embedding_dim: 512
    time_encoding_type: "sinusoidal"
    stack_time_mapping: "linear"
    time_per_stack: 100
    training_objective: "mlm"
"""


def config_of(tmp_path: Path, text: str = DOCUMENT) -> StackWiseConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return StackWiseConfig.from_yaml(path)


def test_the_documents_yaml_is_valid_and_states_the_defaults(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.validate()
    given = config.progressive_config()
    only_model = StackWiseConfig(model={"vocab_size": 60, "d_model": 32, "d_ff": 48, "n_heads": 4})
    assert given == only_model.progressive_config()
    assert config.run_config().model.hidden_size == 32
    assert config.run_config().model.num_layers == 12 * 4


def test_values_may_be_set_as_the_document_does(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.training.progressive.qlora_strategy = "variable"
    config.training.progressive.qlora_configs = {0: {"rank": 8, "alpha": 16}, 1: {"rank": 16, "alpha": 32}}
    made = config.progressive_config(target_stacks=2)
    assert [made.stack_adapter(index).rank for index in (0, 1)] == [8, 16]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trunk_stratgy", "frozen", "unknown key in progressive: trunk_stratgy .did you mean trunk_strategy"),
        ("trunk_strategy", "thawed", "--trunk-strategy thawed: must be one of frozen, qlora, trained"),
        ("new_stack_precision", "int3", "--new-stack-precision int3: must be one of"),
        ("building_mode", "sideways", "--building-mode sideways: must be one of append, prepend"),
        ("qlora_rank", 0, "--qlora-rank 0: must be at least 1"),
        ("qlora_rank", "many", "qlora_rank many: must be a number"),
        ("enabled", "yes please", "enabled yes please: must be true or false"),
        ("target_stacks", 13, "--target-stacks 13: must be at most --max-stacks 12"),
        ("qlora_rank_pattern", "increasing", "requires --qlora-strategy progressive"),
        ("stack_time_mapping", "custom", "--stack-time-mapping custom: requires --custom-time-mapping"),
        ("joint_lr", 1e-3, "--joint-lr 0.001: requires --joint-steps"),
    ],
)
def test_a_key_that_is_unknown_or_contradicts_another_is_told_in_one_line(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    config = config_of(tmp_path)
    setattr(config.training.progressive, key, value)
    with pytest.raises(ValueError, match=message) as error:
        config.validate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_model: 32, n_heads: 4}\n", "model.vocab_size None: must be an integer"),
        ("model: {vocab_size: 8, d_model: 32}\n", "model.n_heads is missing"),
        ("model: {vocab_size: 8, d_model: 32, n_heads: 4, depth: 3}\n", "unknown key in model: depth"),
        ("modell: {vocab_size: 8}\n", "unknown section: modell .did you mean model"),
        ("model: 3\n", "must have sections"),
        ("model:\n  d_model: 32\n   n_heads: 4\n", "yaml, line 3, column 11: not valid YAML: mapping values"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, text).validate()


def test_stacks_are_appended_and_prepended_with_precisions_of_their_own(tmp_path: Path) -> None:
    builder = ProgressiveRackBuilder(
        config=config_of(tmp_path), building_mode="append", default_precision="full"
    )
    builder.append_stack(n_blocks=4, precision="full")
    builder.append_stack(n_blocks=2, precision="half")
    newest = builder.prepend_stack(n_blocks=3, precision="qlora")
    assert [(stack.index, stack.n_blocks, stack.precision) for stack in builder.rack.stacks] == [
        (2, 3, "qlora"),
        (0, 4, "full"),
        (1, 2, "half"),
    ]
    assert newest.index == 2
    assert create_stack_from_config(0, None, config_of(tmp_path)).n_blocks == 4
    with pytest.raises(ValueError, match="pass either a config, or vocab_size"):
        ProgressiveRackBuilder()
    with pytest.raises(ValueError, match="precision int3: must be one of"):
        builder.append_stack(precision="int3")
    with pytest.raises(ValueError, match="trunk_indices 3: must be from 0 to 2"):
        builder.freeze_trunk([3])


def frozen_by_hand() -> dict[str, set[str]]:
    process_groups.shutdown = lambda: None
    builder = ProgressiveRackBuilder(vocab_size=60, d_model=32, d_ff=48, n_heads=4)
    builder.config.training.progressive.n_blocks = 1
    for _ in range(3):
        builder.append_stack()
    rack = builder.build_rack(trains="all")
    trained = {"all": {n for n, p in rack.named_parameters() if p.requires_grad}}
    builder.freeze_trunk([0])
    builder.freeze_all_but_qlora([1])
    trained["frozen"] = {n for n, p in rack.named_parameters() if p.requires_grad}
    return trained


def test_freezing_by_hand_leaves_what_it_says() -> None:
    found = run_single(frozen_by_hand)
    frozen = found["all"] - found["frozen"]
    assert {name for name in found["all"] if name.startswith("decoder.layers.0.")} <= frozen
    second = {name for name in found["all"] if name.startswith("decoder.layers.1.")}
    assert {name for name in second if ".adapters." in name} == second & found["frozen"]
    assert not any(name.startswith(("decoder.layers.2.", "output_layer")) for name in frozen)


def loader() -> list[dict[str, torch.Tensor]]:
    """Every odd token follows from the one before it."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, 5, (4, 2, 8), generator=generator)
    return [{"input_ids": torch.stack([ids, ids + 30], dim=2).flatten(1)} for ids in half]


def small_config(**progressive: Any) -> StackWiseConfig:
    return StackWiseConfig(
        model={"vocab_size": 60, "d_model": 32, "d_ff": 48, "n_heads": 4, "seq_length": 16},
        training={
            "lr": 1e-2,
            "progressive": {"n_blocks": 2, "stack_steps": 3, "qlora_rank": 4, **progressive},
        },
    )


def train_at_once_and_step_by_step(folder: str) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
    process_groups.shutdown = lambda: None
    racks, results = [], []
    for name, targets in (("at_once", (3,)), ("apart", (1, 2, 3))):
        builder = ProgressiveRackBuilder(config=small_config(training_objective="clm"))
        trainer = ProgressiveTrainer(builder.config, save=f"{folder}/{name}")
        for target in targets:
            found = trainer.train_rack(rack_builder=builder, dataloader=loader(), target_stacks=target)
        results.append(found)
        rack = builder.build_rack()
        racks.append({n: p.detach().clone() for n, p in rack.named_parameters()})
    return results, racks


def test_growing_from_two_to_six_layers_by_one_call_equals_three(tmp_path: Path) -> None:
    (result, _), (at_once, apart) = run_single(train_at_once_and_step_by_step, str(tmp_path))
    assert [len(stack.losses) for stack in result.stacks] == [3, 3, 3]
    assert result.stacks[-1].iterations == 9
    assert sum(name.startswith("decoder.layers.5.") for name in at_once) > 0
    assert at_once.keys() == apart.keys()
    assert all(torch.equal(value, apart[name]) for name, value in at_once.items())


def refused_beside_checkpoints(folder: str) -> str:
    process_groups.shutdown = lambda: None
    Path(folder, "iter_0000004").mkdir()
    builder = ProgressiveRackBuilder(config=small_config(training_objective="clm"))
    with pytest.raises(ValueError, match="requires its own directory") as caught:
        ProgressiveTrainer(builder.config, save=folder).train_rack(builder, loader(), target_stacks=1)
    return str(caught.value)


def test_a_directory_with_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    told = run_single(refused_beside_checkpoints, str(tmp_path))
    assert told.startswith(f"--save {tmp_path}: contains another run (steps 4)")
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000004"]


def train_masked() -> list[list[float]]:
    process_groups.shutdown = lambda: None
    config = small_config(training_objective="mlm", trunk_strategy="qlora", stack_steps=24)
    config.training.progressive.time_interpretation = "input"
    config.training.progressive.time_encoding_type = "learned"
    builder = ProgressiveRackBuilder(config=config)
    results = ProgressiveTrainer(config).train_progressively(
        rack_builder=builder, dataloader=loader(), target_stacks=2
    )
    assert builder.build_rack().output_layer.weight.size(0) >= 62
    return [stack.losses for stack in results.stacks]


def test_a_masked_training_with_a_qlora_trunk_and_time_as_input_learns() -> None:
    first, second = run_single(train_masked)
    assert sum(second[-8:]) < 0.8 * sum(first[:8])


def test_clm_batches_tell_which_positions_count() -> None:
    config = StackWiseConfig(model={"vocab_size": 60, "d_model": 32, "n_heads": 4})
    config.training.progressive.training_objective = "clm"
    batches = list(ProgressiveDataLoader(loader(), TimeStepMasking(config), 0))
    assert len(batches) == 4
    for batch, plain in zip(batches, loader(), strict=True):
        assert batch["training_objective"] == "clm"
        assert torch.equal(batch["targets"][:, :-1], plain["input_ids"][:, 1:])
        assert batch["combined_masks"].sum() == 2 * 15
        assert batch["combined_masks"][:, -1].sum() == 0


def test_masked_batches_replace_tokens_and_carry_activations_where_all_are_there() -> None:
    config = StackWiseConfig(model={"vocab_size": 60, "d_model": 32, "n_heads": 4})
    first = loader()[0]["input_ids"]
    known = {sample: torch.full((16, 32), float(row)) for row, sample in enumerate(sample_ids(first))}
    masking = TimeStepMasking(config)
    batches = list(ProgressiveDataLoader(loader(), masking, 2, known, mask_token_id=60))
    assert torch.equal(batches[0]["masks"], masking.generate_masks_for_stack({"tokens": first}, stack_idx=2))
    assert masking.get_time_step_for_stack(stack_idx=2) == 200
    assert (batches[0]["tokens"] == 60).equal(batches[0]["masks"])
    assert torch.equal(batches[0]["targets"], first)
    assert batches[0]["trunk_activations"].shape == (16, 2, 32)
    assert "trunk_activations" not in batches[1]
    without = ProgressiveDataLoader(loader(), masking, 2, known, cache_activations=False, mask_token_id=60)
    assert "trunk_activations" not in next(iter(without))
