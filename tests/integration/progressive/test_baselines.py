"""What growth is compared with: end to end is plain pretraining; G_stack doubles the trunk and trains everything.

And document 004's own kind of run: a trunk whose adapters train, with the cache that it then cannot use.
"""

import contextlib
import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.progressive.growth.rack import rack_of
from megatron_ext.progressive.growth.trunk_strategy import why_uncached
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpointer import load_weights
from tests.distributed.families.test_grown_weights import TRUNK, grown_model, logits
from tests.integration.progressive import progressive_run_helpers as run_helpers
from tests.integration.progressive.progressive_run_helpers import (
    ROOT,
    VOCABULARY,
    losses_of,
    stored,
    train,
    write_data,
)


def pretrain_plainly(data: str, save: str, *flags: str) -> str:
    """Output of `pretrain_gpt_per_layer.py` without PLE, with the flags of `run_helpers` that are not progressive."""
    name = "pretrain_gpt_per_layer"
    specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    shared = run_helpers.FLAGS[: run_helpers.FLAGS.index("--training-objective")]
    output, argv = io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *shared, "--data-path", data, "--save", save, *flags]
    try:
        with contextlib.redirect_stdout(output):
            assert module.main() == 0
    finally:
        sys.argv = argv
    return output.getvalue()


def baselines(folder: str) -> dict[str, Any]:
    data = write_data(Path(folder))
    flags = ("--target-stacks", "2", "--n-blocks", "1", "--hidden-dropout", "0.1")
    grown = train(data, f"{folder}/end", "--no-enabled", "--stack-steps", "3", *flags)
    plain = ("--num-layers", "2", "--train-iters", "6", "--untie-embeddings-and-output-weights")
    found: dict[str, Any] = {"end to end": grown[1]}
    found["plain"] = pretrain_plainly(data, f"{folder}/plain", *plain, "--hidden-dropout", "0.1")
    found["weights"] = [stored(folder, name) for name in ("end/progressive_rack", "plain")]
    strategy = ("--trunk-strategy", "trained", "--no-qlora-enabled", "--growth-init", "copy")
    for stacks in ("1", "2"):
        train(data, f"{folder}/g_stack", *strategy, "--stack-steps", "2", "--target-stacks", stacks)
    found["g_stack"] = [stored(f"{folder}/g_stack", f"progressive_stack_{i}") for i in (0, 1)]
    changes: dict[str, Any] = {"trunk_strategy": "trained", "qlora_enabled": False, "growth_init": "copy"}
    chunks, _ = grown_model(f"{folder}/g_stack", **changes)
    found["all train"] = all(parameter.requires_grad for parameter in chunks[0].parameters())
    trunk, whole = (
        build_model(replace(TRUNK, num_layers=n), ParallelConfig(), vocab_size=VOCABULARY, seed=9)[0]
        for n in (2, 4)
    )
    load_weights(f"{folder}/g_stack/progressive_stack_0", [trunk], [], vocab_size=VOCABULARY)
    weights = dict(trunk.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            source = name.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")
            parameter.copy_(weights[source])
    found["logits"] = logits(chunks[0]), logits(whole)
    qlora = ("--trunk-strategy", "qlora", "--cache-activations", "--training-objective", "mlm")
    found["qlora"] = train(data, f"{folder}/qlora", *qlora, "--stack-steps", "1", "--target-stacks", "2")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_single(baselines, str(tmp_path_factory.mktemp("baselines")))


def test_end_to_end_is_plain_pretraining_to_the_bit(found: dict[str, Any]) -> None:
    assert len(losses_of(found["plain"])) == 6
    assert losses_of(found["end to end"]) == losses_of(found["plain"])
    grown, plain = found["weights"]
    assert grown.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in grown.items())


def test_g_stack_begins_with_the_trunk_twice_and_trains_all_of_it(found: dict[str, Any]) -> None:
    ours, by_hand = found["logits"]
    assert torch.equal(ours, by_hand)
    assert found["all train"]
    trunk, grown = found["g_stack"]
    moved = [name for name, value in trunk.items() if name.endswith("weight") and "optimizer" not in name]
    assert len(moved) > 8
    assert not any(torch.equal(trunk[name], grown[name]) for name in moved)


def test_a_qlora_trunk_ignores_the_cache_and_says_so(found: dict[str, Any]) -> None:
    code, output = found["qlora"]
    assert code == 0 and len(losses_of(output)) == 2
    told = "no activation cache: the trunk's adapters are trained (--trunk-strategy qlora)"
    assert output.count(told) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"trunk_strategy": "qlora"}, "adapters are trained"),
        ({"trunk_strategy": "trained"}, "weights are trained"),
        ({"train_embedding": True}, "the embedding is trained"),
        ({"building_mode": ("prepend",)}, "before the trunk"),
    ],
)
def test_what_keeps_a_trunk_from_being_cached_is_named(changes: dict[str, Any], reason: str | None) -> None:
    config = ProgressiveConfig(target_stacks=2, **changes)
    told = why_uncached(rack_of(config, 2), config, "newest")
    assert told is None if reason is None else reason in str(told)
    assert why_uncached(rack_of(config, 1), config, "newest") is None
