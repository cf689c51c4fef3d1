"""Stacks of all five precisions in one rack, through the script, in fp32 and bf16: bytes by stack, and a resumption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.testing.run_single import run_single
from tests.integration.progressive.progressive_run_helpers import losses_of, stored, train, write_data

PRECISIONS = ("full", "half", "bfloat16", "qlora", "nvfp4")
FLAGS = (
    *("--n-blocks", "1", "--target-stacks", "5", "--stack-steps", "1", "--joint-steps", "1"),
    *("--new-stack-precision", *PRECISIONS, "--ffn-hidden-size", "64", "--normalization", "RMSNorm"),
)
SHAPES = [(64, 32), (32, 32), (128, 32), (32, 64)]
"""Of a layer's linear modules, [output, input]."""

WEIGHTS = sum(rows * columns for rows, columns in SHAPES)
NORMS = 2 * 32


def adapters(rank: int) -> int:
    return rank * sum(map(sum, SHAPES))


def expected_bytes(size: int) -> list[float]:
    """By stack, with the last one training in a run whose values take `size` bytes."""
    frozen = [4 * WEIGHTS, 2 * WEIGHTS, 2 * WEIGHTS, WEIGHTS / 2 + 4 * WEIGHTS / 64]
    newest = size * (WEIGHTS + adapters(4) + NORMS)
    return [*(weights + size * (adapters(4) + adapters(2) + NORMS) for weights in frozen), newest]


def runs(folder: str) -> dict[str, Any]:
    data = write_data(Path(folder))
    bf16 = ("--bf16", "--use-distributed-optimizer")
    found: dict[str, Any] = {"fp32 output": train(data, f"{folder}/fp32", *FLAGS)[1]}
    found["bf16 output"] = train(data, f"{folder}/bf16", *FLAGS, *bf16)[1]
    for stop in ("2", "3"):
        train(data, f"{folder}/pieces", *FLAGS, *bf16, "--exit-interval", stop)
    train(data, f"{folder}/pieces", *FLAGS, *bf16)
    for name in ("fp32", "bf16"):
        history = json.loads(Path(folder, name, "progressive.json").read_text())
        found[name] = [phase["stack_bytes"] for phase in history["finished"]]
    found["weights"] = stored(f"{folder}/bf16", "progressive_rack")
    found["weights in pieces"] = stored(f"{folder}/pieces", "progressive_rack")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_single(runs, str(tmp_path_factory.mktemp("mixed")))


def test_every_stack_takes_the_bytes_of_its_precision(found: dict[str, Any]) -> None:
    assert found["fp32"][4] == expected_bytes(4)
    assert found["bf16"][4] == expected_bytes(2)
    first = found["bf16"][0][0]  # full, while it trains: fp32 but for norms and adapters
    assert first == 4 * WEIGHTS + 2 * (adapters(4) + NORMS)


def test_precision_costs_little_of_the_loss_and_is_told(found: dict[str, Any]) -> None:
    plain, low = (losses_of(found[f"{name} output"]) for name in ("fp32", "bf16"))
    assert len(plain) == len(low) == 6
    assert low == pytest.approx(plain, rel=0.02)
    for stack, precision in enumerate(("full", "half", "bfloat16", "nf4")):
        assert f"stack {stack} ({precision}, frozen, output cached) " in found["bf16 output"]
    assert "stack 4 (bfloat16, trained) " in found["bf16 output"]
    assert "--bf16: stacks of precision full are stored and computed in fp32" in found["bf16 output"]
    assert "--bf16" not in found["fp32 output"]


def test_a_mixed_rack_that_is_left_between_stacks_ends_with_the_same_bits(found: dict[str, Any]) -> None:
    whole, pieces = found["weights"], found["weights in pieces"]
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(value, pieces[name]) for name, value in whole.items())
    assert whole["decoder.layers.0.mlp.linear_fc1.weight"].dtype == torch.float32
    assert whole["decoder.layers.2.mlp.linear_fc1.weight"].dtype == torch.bfloat16
