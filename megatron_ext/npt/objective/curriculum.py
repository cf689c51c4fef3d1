"""What NPT layers are fed with in the course of training: the teacher's inputs, a blend, or their own.

    name:steps[:attn_ratio[:mlp_ratio]],...        teacher:20000,mixed:30000:0.5,student:40000

Steps are durations. A ratio is the student's share, `(1 - ratio) * teacher + ratio * student`: of the attention's
input, and of the MLP's (by default the same). `teacher` is a share of 0, `student` of 1, `mixed` of 0.5 where none is
given.
The stage follows from the step alone; after the last stage's steps the last stage stays.
Source: document 001.
"""

from dataclasses import dataclass

SHARES = {"teacher": 0.0, "mixed": 0.5, "student": 1.0}
"""Stage -> the student's share where none is given."""

PROPORTIONS = {"teacher": 2, "mixed": 3, "student": 4}
"""How the stages share a run where no durations are given: document 001's."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage."""

    name: str
    """`teacher`, `mixed` or `student`."""

    steps: int
    """Its duration."""

    attention_share: float
    """The student's share in the attention's input."""

    mlp_share: float
    """The student's share in the MLP's input."""

    @property
    def blends(self) -> bool:
        """The teacher's inputs enter the layers."""
        return min(self.attention_share, self.mlp_share) < 1


STUDENT = Stage(name="student", steps=1, attention_share=1.0, mlp_share=1.0)
"""What runs without a curriculum."""


def parse_curriculum(text: str) -> tuple[Stage, ...]:
    """The stages of `name:steps[:attn_ratio[:mlp_ratio]],...`.

    Raises:
        ValueError: the text is no curriculum, naming the part.
    """
    return tuple(_parse_stage(text, part.strip()) for part in text.split(","))


def proportional_curriculum(total_steps: int) -> tuple[Stage, ...]:
    """Teacher, mixed and student, as 2 : 3 : 4 of a run; at least one step each."""
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
    """The text that `parse_curriculum` reads as these stages."""
    return ",".join(f"{s.name}:{s.steps}:{s.attention_share:g}:{s.mlp_share:g}" for s in stages)


def stage_index(stages: tuple[Stage, ...], iteration: int) -> int:
    """Which stage step `iteration` (from 1) belongs to."""
    end = 0
    for index, stage in enumerate(stages):
        end += stage.steps
        if iteration <= end:
            return index
    return len(stages) - 1


def _parse_stage(text: str, part: str) -> Stage:
    name, *numbers = part.split(":")
    wrong = f"--curriculum-stages {text}: '{part}' is not name:steps[:attn_ratio[:mlp_ratio]]"
    if name not in SHARES:
        raise ValueError(f"{wrong}; the name must be one of {', '.join(SHARES)}")
    try:
        steps, ratios = int(numbers[0]), [float(number) for number in numbers[1:]]
    except (IndexError, ValueError):
        raise ValueError(wrong) from None
    if steps < 1 or len(ratios) > 2 or not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{wrong}; steps are at least 1, ratios lie in [0, 1]")
    fixed = SHARES[name]
    if name != "mixed" and any(ratio != fixed for ratio in ratios):
        raise ValueError(f"{wrong}; the ratio of {name} is {fixed:g}")
    attention = ratios[0] if ratios else fixed
    return Stage(
        name=name,
        steps=steps,
        attention_share=attention,
        mlp_share=ratios[1] if len(ratios) > 1 else attention,
    )
