"""The curriculum, which sets the inputs of NPT layers: the teacher's hidden states, the student's, or a blend.

A curriculum is written as a list of stages (format, and an example):

    name:steps[:attn_ratio[:mlp_ratio]],...        teacher:20000,mixed:30000:0.5,student:40000

Each stage lasts the given number of steps. A ratio is the student's share in an input,
`(1 - ratio) * teacher + ratio * student`: attn_ratio in attention's input, mlp_ratio in the MLP's input. By default
mlp_ratio equals attn_ratio. The share is 0 for `teacher`, 1 for `student` and by default 0.5 for `mixed`. The stage
depends only on the step; the last stage lasts until the end of the run.
Source: docs/design/npt_curriculum.md.
"""

from dataclasses import dataclass

SHARES = {"teacher": 0.0, "mixed": 0.5, "student": 1.0}
"""Maps the name of each stage to the student's default share."""

PROPORTIONS = {"teacher": 2, "mixed": 3, "student": 4}
"""Default durations of the stages relative to each other, from docs/design/npt_curriculum.md."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum."""

    name: str
    """`teacher`, `mixed` or `student`."""

    steps: int
    """Duration in steps."""

    attention_share: float
    """The student's share in attention's input."""

    mlp_share: float
    """The student's share in the MLP's input."""

    @property
    def blends(self) -> bool:
        """Whether the NPT layers get the teacher's hidden states, alone or blended with the student's."""
        return min(self.attention_share, self.mlp_share) < 1


STUDENT = Stage(name="student", steps=1, attention_share=1.0, mlp_share=1.0)
"""The only stage of a run without a curriculum."""


TEACHER = Stage(name="teacher", steps=1, attention_share=0.0, mlp_share=0.0)
"""The only stage of layer-parallel training."""


def parse_curriculum(text: str) -> tuple[Stage, ...]:
    """Parses a curriculum written as `name:steps[:attn_ratio[:mlp_ratio]],...`.

    Raises:
        ValueError: a stage has another format; the message names the stage.
    """
    return tuple(_parse_stage(text, part.strip()) for part in text.split(","))


def proportional_curriculum(total_steps: int) -> tuple[Stage, ...]:
    """Returns the stages teacher, mixed and student. They divide the run's steps 2 : 3 : 4; each gets at least one."""
    whole = sum(PROPORTIONS.values())
    return tuple(
        Stage(
            name=name,
            steps=max(1, total_steps * part // whole),
            attention_share=SHARES[name],
            mlp_share=SHARES[name],
        )
        for name, part in PROPORTIONS.items()
    )


def format_curriculum(stages: tuple[Stage, ...]) -> str:
    """Writes stages as a text that `parse_curriculum` reads."""
    return ",".join(f"{s.name}:{s.steps}:{s.attention_share:g}:{s.mlp_share:g}" for s in stages)


def stage_index(stages: tuple[Stage, ...], iteration: int) -> int:
    """Returns the index of the stage to which step `iteration`, counted from 1, belongs."""
    end = 0
    for index, stage in enumerate(stages):
        end += stage.steps
        if iteration <= end:
            return index
    return len(stages) - 1


def _parse_stage(text: str, part: str) -> Stage:
    name, *numbers = part.split(":")
    wrong = f"--curriculum-stages {text}: '{part}' must have the format name:steps[:attn_ratio[:mlp_ratio]]"
    if name not in SHARES:
        raise ValueError(f"{wrong}; the name must be one of {', '.join(SHARES)}")
    try:
        steps, ratios = int(numbers[0]), [float(number) for number in numbers[1:]]
    except (IndexError, ValueError):
        raise ValueError(wrong) from None
    if steps < 1 or len(ratios) > 2 or not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{wrong}; steps must be at least 1, and ratios from 0 to 1")
    fixed = SHARES[name]
    if name != "mixed" and any(ratio != fixed for ratio in ratios):
        raise ValueError(f"{wrong}; the ratio of {name} must be {fixed:g}")
    attention = ratios[0] if ratios else fixed
    return Stage(
        name=name,
        steps=steps,
        attention_share=attention,
        mlp_share=ratios[1] if len(ratios) > 1 else attention,
    )
