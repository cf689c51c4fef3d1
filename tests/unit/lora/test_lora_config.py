"""Rank and alpha of each stack's adapters, as document 004 has them, and what is refused."""

from typing import Any

import pytest

from megatron_ext.lora.lora_config import AdapterShape, LoRAConfig


def ranks(config: LoRAConfig, stacks: int = 4) -> list[tuple[int, float]]:
    return [(shape.rank, shape.alpha) for shape in map(config.stack_adapter, range(stacks))]


def test_the_defaults_are_document_004s() -> None:
    config = LoRAConfig()
    assert config.qlora_enabled and config.progressive_qlora and config.qlora_strategy == "simplified"
    assert config.stack_adapter(3) == AdapterShape(rank=16, alpha=32)
    assert config.progressive_adapter() == AdapterShape(rank=8, alpha=16)
    assert config.stack_adapter(0).scale == 2.0


PATTERNS: dict[str | None, list[int]] = {
    None: [16, 32, 64, 128],
    "increasing": [16, 32, 64, 128],
    "decreasing": [16, 8, 4, 2],
    "linear": [16, 24, 32, 40],
    "constant": [16, 16, 16, 16],
}


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS.items())
def test_the_rank_follows_its_pattern_and_alpha_stays(pattern: Any, expected: list[int]) -> None:
    config = LoRAConfig(qlora_strategy="progressive", qlora_rank_pattern=pattern)
    assert ranks(config) == [(rank, 32) for rank in expected]


def test_alpha_has_a_pattern_of_its_own_and_a_falling_rank_ends_at_1() -> None:
    config = LoRAConfig(
        qlora_strategy="progressive",
        qlora_rank=2,
        qlora_rank_pattern="decreasing",
        qlora_alpha_pattern="linear",
    )
    assert ranks(config) == [(2, 32), (1, 40), (1, 48), (1, 56)]


def test_the_strategy_variable_takes_document_004s_table() -> None:
    config = LoRAConfig(qlora_strategy="variable", qlora_configs="0:8:16,1:16:32,2:32:64,3:64:128")
    assert ranks(config) == [(8, 16), (16, 32), (32, 64), (64, 128)]
    config.check_stacks(4)
    with pytest.raises(
        ValueError, match=r"^--qlora-configs .*: lists 4 stacks, but the model has 5; add the missing ones$"
    ):
        config.check_stacks(5)


def test_a_stack_of_the_trunk_has_two_adapters_at_most() -> None:
    config = LoRAConfig()
    assert list(config.adapters(1, in_trunk=False)) == ["stack"]
    assert list(config.adapters(1, in_trunk=True)) == ["stack", "progressive"]
    assert list(LoRAConfig(progressive_qlora=False).adapters(1, in_trunk=True)) == ["stack"]
    assert LoRAConfig(qlora_enabled=False).adapters(1, in_trunk=True) == {}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"qlora_rank": 0}, "--qlora-rank 0: must be at least 1"),
    ({"progressive_qlora_rank": 0}, "--progressive-qlora-rank 0: must be at least 1"),
    ({"qlora_alpha": 0}, "--qlora-alpha 0: must be above 0"),
    ({"qlora_strategy": "other"}, "--qlora-strategy other: must be one of simplified, progressive, variable"),
    (
        {"qlora_rank_pattern": "linear"},
        "--qlora-rank-pattern linear: requires --qlora-strategy progressive (got simplified)",
    ),
    (
        {"qlora_configs": "0:8:16"},
        "--qlora-configs 0:8:16: requires --qlora-strategy variable (got simplified)",
    ),
    (
        {"qlora_strategy": "variable"},
        "--qlora-configs : must be a comma-separated list of stack:rank:alpha, such as 0:8:16,1:16:32",
    ),
    (
        {"qlora_strategy": "variable", "qlora_configs": "0:0:16"},
        "--qlora-configs 0:0:16: stack 0 has rank 0, alpha 16; the rank must be at least 1, and alpha above 0",
    ),
    (
        {"qlora_strategy": "variable", "qlora_configs": "0:8:16,2:8:16"},
        "--qlora-configs 0:8:16,2:8:16: must list every stack from 0 on, but lists [0, 2]",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LoRAConfig(**arguments)
    assert str(error.value) == message
