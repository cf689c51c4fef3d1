"""Which sizes, and whose keys and values, each layer has; and what is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config.cross_checks import validate
from megatron_ext.config.groups.model.layer_shapes import refuse_layer_sizes
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig

PLAIN = ModelConfig(
    num_layers=6, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, seq_length=16
)
WINDOWED = replace(PLAIN, window_size="7,0", window_attn_skip_freq="3")
E2B = ModelConfig(
    num_layers=35,
    hidden_size=1536,
    num_attention_heads=8,
    num_query_groups=1,
    kv_channels=256,
    seq_length=1024,
    ffn_hidden_sizes="[6144]*15+[12288]*20",
    window_size="511,0",
    window_attn_skip_freq="5",
    kv_channels_full=512,
    num_kv_shared_layers=20,
)


def test_layers_without_a_window_may_have_heads_of_another_size_and_number() -> None:
    model = replace(WINDOWED, kv_channels_full=16, num_query_groups_full=1)
    shapes = [(shape.kv_channels, shape.num_query_groups) for shape in model.layers]
    assert shapes == [(8, 2), (8, 2), (16, 1)] * 2
    assert {(shape.kv_channels, shape.num_query_groups) for shape in WINDOWED.layers} == {(8, 2)}


def test_a_list_gives_every_layer_the_width_of_its_mlp() -> None:
    model = replace(PLAIN, ffn_hidden_sizes="[48]*2+[96]*4")
    assert [shape.ffn_hidden_size for shape in model.layers] == [48, 48, 96, 96, 96, 96]
    assert model.resolved_ffn_hidden_size == 96


def test_the_last_layers_of_gemma_4_e2b_use_keys_of_layers_13_and_14() -> None:
    sources = [shape.keys_of for shape in E2B.layers]
    assert sources[:15] == [None] * 15
    assert sources[15:] == [13, 13, 13, 13, 14] * 4
    assert [shape.key_value_heads for shape in E2B.layers] == [2] * 15 + [0] * 20


def test_keys_are_values_only_in_layers_without_a_window() -> None:
    for model, heads in ((WINDOWED, [4, 4, 2] * 2), (PLAIN, [2] * 6)):
        model = replace(model, attention_k_eq_v=True)
        assert [shape.key_value_heads for shape in model.layers] == heads


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ffn_hidden_sizes": "[48]*5"}, r"--ffn-hidden-sizes \[48\]\*5: must be a list of 6 widths"),
    ({"ffn_hidden_sizes": "48"}, "--ffn-hidden-sizes 48: must be a list"),
    ({"ffn_hidden_sizes": "[48]*5+[0]"}, "at least 1"),
    ({"ffn_hidden_sizes": "[48]*6", "ffn_hidden_size": 48}, "--ffn-hidden-size 48: cannot be given together"),
    ({"kv_channels_full": 16}, "--kv-channels-full 16: has no effect; it requires --window-size"),
    ({"num_query_groups_full": 1}, "--num-query-groups-full 1: has no effect"),
    ({"num_kv_shared_layers": 6}, r"--num-kv-shared-layers 6: must lie in \[0, 5\]"),
    ({"num_kv_shared_layers": -1}, "--num-kv-shared-layers -1"),
    ({"v_layernorm": True, "attention_backend": "local"}, "--v-layernorm: requires --attention-backend sdpa"),
    ({"rotary_proportion": 0.5, "rotary_percent": 0.5}, "--rotary-proportion 0.5: cannot be given together"),
    (
        {"rotary_proportion": 0.5, "use_rope_scaling": True},
        "--rotary-proportion 0.5: cannot be given together with --use-rope-scaling",
    ),
    ({"rotary_proportion": 0.1}, "--rotary-proportion 0.1: rotates no channels"),
    ({"rotary_proportion": 1.5}, "--rotary-proportion 1.5"),
    ({"rotary_proportion": 0.5, "position_embedding_type": "none"}, "--rotary-proportion 0.5: has no effect"),
]
REFUSED_WITH_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"num_query_groups_full": 3}, "--num-query-groups-full 3: must divide --num-attention-heads 4"),
    ({"kv_channels_full": 7}, "--kv-channels-full 7: .* must be even"),
    (
        {"num_kv_shared_layers": 4},
        r"layer 2 \(counted from 0\) has no sliding window, but none of the first 2 layers is",
    ),
]


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [(PLAIN, *case) for case in REFUSED] + [(WINDOWED, *case) for case in REFUSED_WITH_WINDOWS],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_by_name(model: ModelConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(model, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffn_hidden_sizes": "[48]*5+[49]"}, "--ffn-hidden-size 49: must be divisible"),
        (
            {"num_attention_heads": 6, "num_query_groups": 2, "num_query_groups_full": 3},
            "--num-query-groups 3: must be a multiple or a divisor",
        ),
    ],
)
def test_every_layer_must_divide_over_the_tensor_parallel_ranks(changes: dict[str, Any], words: str) -> None:
    model = replace(WINDOWED, hidden_size=24, **changes)
    with pytest.raises(ValueError, match=words):
        validate(model, ParallelConfig(tensor_model_parallel_size=2), world_size=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn_hidden_sizes": "[48]*6"},
        {"kv_channels_full": 16},
        {"num_query_groups_full": 1},
        {"attention_k_eq_v": True},
        {"num_kv_shared_layers": 2},
    ],
)
def test_families_whose_layers_must_be_equal_refuse_each_difference_by_name(changes: dict[str, Any]) -> None:
    refuse_layer_sizes(WINDOWED, "this family")
    (name,) = changes
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}.*: not supported by this family"):
        refuse_layer_sizes(replace(WINDOWED, **changes), "this family")


def stages(first: int | None, last: int | None, count: int) -> ParallelConfig:
    """A layout with `count` pipeline stages."""
    return ParallelConfig(
        pipeline_model_parallel_size=count,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )


@pytest.mark.parametrize(
    ("first", "last", "count", "sizes"),
    [
        (None, None, 5, (7, 7, 7, 7, 7)),
        (17, None, 2, (17, 18)),
        (None, 17, 2, (18, 17)),
        (17, 18, 2, (17, 18)),
        (8, 9, 4, (8, 9, 9, 9)),
        (5, None, 4, (5, 10, 10, 10)),
    ],
)
def test_first_and_last_stage_may_hold_other_numbers_of_layers(
    first: int | None, last: int | None, count: int, sizes: tuple[int, ...]
) -> None:
    validate(E2B, stages(first, last, count), world_size=count)
    assert stages(first, last, count).stage_sizes(E2B.num_layers) == sizes


@pytest.mark.parametrize(
    ("first", "last", "count", "words"),
    [
        (None, None, 2, "--num-layers 35: must be divisible by --pipeline-model-parallel-size 2"),
        (17, 17, 2, "--num-layers 35: with .*first.* 17 and .*last.* 17, 1 layers are left"),
        (35, None, 2, "--num-layers 35: with --decoder-first-pipeline-num-layers 35, 0 layers are left"),
        (7, None, 4, "28 layers are left, which must be divisible by 3"),
        (
            17,
            None,
            1,
            "--decoder-first-pipeline-num-layers 17: requires --pipeline-model-parallel-size above 1",
        ),
    ],
)
def test_layers_that_do_not_fill_the_stages_are_refused(
    first: int | None, last: int | None, count: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        validate(E2B, stages(first, last, count), world_size=count)


def test_stages_of_different_size_are_refused_with_the_interleaved_schedule() -> None:
    with pytest.raises(ValueError, match="--decoder-last-pipeline-num-layers 3: cannot be given together"):
        replace(stages(None, 3, 2), num_layers_per_virtual_pipeline_stage=1)
