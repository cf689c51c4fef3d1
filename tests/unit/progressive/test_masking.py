"""Time steps and masks: formulas, determinism, and what must not be masked."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_ext.progressive.objectives.masking import TimeStepMasking
from megatron_ext.progressive.objectives.time_steps import (
    mask_fraction,
    time_step_of_fraction,
    time_step_of_stack,
)
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig

CONFIG = ProgressiveConfig(max_stacks=6)
INPUT = replace(CONFIG, time_interpretation="input")
TOKENS = torch.arange(4 * 200).view(4, 200)
BATCH = {"tokens": TOKENS, "loss_mask": torch.ones(4, 200)}


def half_way(stack_idx: int, max_stacks: int, num_time_steps: int) -> int:
    return min(stack_idx * 50, num_time_steps - 1)


def too_late(stack_idx: int, max_stacks: int, num_time_steps: int) -> int:
    return num_time_steps


def test_linear_time_is_a_step_a_stack_up_to_the_last() -> None:
    config = replace(CONFIG, num_time_steps=250)
    assert [time_step_of_stack(config, stack) for stack in range(4)] == [0, 100, 200, 249]


def test_exponential_time_is_document_004s() -> None:
    config = replace(CONFIG, stack_time_mapping="exponential")
    expected = [min(int(100 * math.e ** (stack / 2)), 599) for stack in range(6)]
    assert [time_step_of_stack(config, stack) for stack in range(6)] == expected


def test_custom_time_is_a_function_by_its_name() -> None:
    config = replace(CONFIG, stack_time_mapping="custom", custom_time_mapping=f"{__name__}.half_way")
    assert [time_step_of_stack(config, stack) for stack in (0, 3)] == [0, 150]


@pytest.mark.parametrize("name", ["too_late", "missing"])
def test_a_custom_time_that_cannot_be_used_names_the_flag(name: str) -> None:
    config = replace(CONFIG, stack_time_mapping="custom", custom_time_mapping=f"{__name__}.{name}")
    with pytest.raises(ValueError, match=rf"--custom-time-mapping .*{name}"):
        time_step_of_stack(config, 1)


def test_the_masked_share_grows_from_015_to_09_and_back_to_its_time() -> None:
    steps = torch.arange(600)
    fractions = mask_fraction(CONFIG, steps)
    assert fractions[0] == 0.15 and float(fractions[-1]) == pytest.approx(0.9)
    assert bool((fractions.diff() > 0).all())
    assert [time_step_of_fraction(CONFIG, float(f)) for f in fractions] == steps.tolist()
    assert time_step_of_fraction(CONFIG, 0.01) == 0 and time_step_of_fraction(CONFIG, 1.0) == 599


def test_masks_have_the_share_of_their_time_in_every_sequence() -> None:
    masking = TimeStepMasking(CONFIG)
    for stack in (0, 5):
        fraction = float(mask_fraction(CONFIG, torch.tensor(masking.get_time_step_for_stack(stack))))
        masks = masking.generate_masks_for_stack(BATCH, stack)
        assert masks.sum(1).tolist() == [round(200 * fraction)] * 4


def test_masks_are_a_function_of_seed_sample_epoch_and_stack() -> None:
    masks = TimeStepMasking(CONFIG).generate_masks_for_stack(BATCH, 1)
    again = TimeStepMasking(CONFIG).generate_masks_for_stack({"tokens": TOKENS.flip(0)}, 1).flip(0)
    assert torch.equal(masks, again)
    assert not torch.equal(masks[0], masks[1])
    later = BATCH | {"epoch": torch.tensor([0, 1, 0, 1])}
    in_epoch = TimeStepMasking(CONFIG).generate_masks_for_stack(later, 1)
    assert (in_epoch == masks).all(1).tolist() == [True, False, True, False]
    assert not torch.equal(masks, TimeStepMasking(CONFIG, seed=2).generate_masks_for_stack(BATCH, 1))
    assert not torch.equal(masks, TimeStepMasking(CONFIG).generate_masks_for_stack(TOKENS + 1, 1))
    same_time = replace(CONFIG, num_time_steps=1)
    first, second = (TimeStepMasking(same_time).generate_masks_for_stack(BATCH, stack) for stack in (0, 1))
    assert not torch.equal(first, second)


def test_fixed_masks_depend_on_seed_and_sample_and_grow_with_time() -> None:
    masking = TimeStepMasking(CONFIG, fixed=True)
    masks = [masking.generate_masks_for_stack(BATCH, stack) for stack in range(6)]
    later = BATCH | {"epoch": torch.ones(4, dtype=torch.long)}
    assert torch.equal(masks[2], masking.generate_masks_for_stack(later, 2))
    assert all(bool((after | ~before).all()) for before, after in itertools.pairwise(masks))
    seeded = TimeStepMasking(CONFIG, fixed=True, seed=2)
    assert not torch.equal(masks[2], seeded.generate_masks_for_stack(BATCH, 2))


def test_what_the_data_leaves_out_is_never_masked() -> None:
    loss_mask = torch.ones(4, 200)
    loss_mask[:, ::2] = 0
    loss_mask[3] = 0
    masks = TimeStepMasking(CONFIG).generate_masks_for_stack({"tokens": TOKENS, "loss_mask": loss_mask}, 5)
    assert not masks[loss_mask == 0].any()
    assert masks[0].sum() > 60


def test_time_as_input_is_uniform_over_sequences() -> None:
    tokens = torch.arange(600 * 8).view(600, 8)
    drawn = TimeStepMasking(INPUT).draw({"tokens": tokens}, 0)
    counts = torch.histc(drawn.time_steps.double(), bins=6, min=0, max=600)
    assert drawn.time_steps.min() >= 0 and drawn.time_steps.max() < 600
    assert bool((counts > 70).all() and (counts < 130).all())
    fractions = mask_fraction(INPUT, drawn.time_steps)
    assert drawn.masks.sum(1).tolist() == (fractions * 8).round().clamp(min=1).long().tolist()
    with pytest.raises(ValueError, match="requires --time-interpretation depth"):
        TimeStepMasking(INPUT).get_time_step_for_stack(0)
