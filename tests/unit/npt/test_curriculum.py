"""The curriculum's text, its stages, and which stage a step belongs to; no model is built."""

import pytest

from megatron_ext.npt.objective.curriculum import (
    format_curriculum,
    parse_curriculum,
    proportional_curriculum,
    stage_index,
)

EXAMPLE = "teacher:20000,mixed:30000:0.5,student:40000"


def test_steps_are_durations_and_the_last_stage_stays() -> None:
    stages = parse_curriculum(EXAMPLE)
    expected = {
        1: "teacher",
        20000: "teacher",
        20001: "mixed",
        50000: "mixed",
        50001: "student",
        90000: "student",
        90001: "student",
        10**6: "student",
    }
    assert {step: stages[stage_index(stages, step)].name for step in expected} == expected


def test_without_durations_a_run_is_shared_out_as_two_to_three_to_four() -> None:
    assert [(stage.name, stage.steps) for stage in proportional_curriculum(900)] == [
        ("teacher", 200),
        ("mixed", 300),
        ("student", 400),
    ]
    assert all(stage.steps >= 1 for stage in proportional_curriculum(1))


def test_the_mlps_ratio_is_the_attentions_where_none_is_given() -> None:
    (mixed,) = parse_curriculum("mixed:1:0.3")
    assert (mixed.attention_share, mixed.mlp_share) == (0.3, 0.3)
    (mixed,) = parse_curriculum("mixed:1:0.3:0.6")
    assert (mixed.attention_share, mixed.mlp_share) == (0.3, 0.6)


def test_a_formatted_curriculum_is_read_as_the_same_stages() -> None:
    stages = parse_curriculum("teacher:2,mixed:3:0.25:0.75,student:4")
    assert parse_curriculum(format_curriculum(stages)) == stages


@pytest.mark.parametrize(
    "text", ["", "teacher", "teacher:0", "mixed:3:1.5", "mixed:3:0.1:0.2:0.3", "teacher:3:0.5", "pupil:3"]
)
def test_what_is_no_curriculum_is_refused_by_the_flags_name(text: str) -> None:
    with pytest.raises(ValueError, match="--curriculum-stages"):
        parse_curriculum(text)
