"""Unmasking: order, steps, determinism, and the same tokens at every parallel layout."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.progressive.objectives.time_steps import mask_fraction
from megatron_ext.progressive.objectives.unmasking import DiffusionSampling, generate_by_unmasking, unmask
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Batch
from tests.unit.progressive.objective_helpers import MASK, MLM, MODEL, ObjectiveFamily

GREEDY = DiffusionSampling(max_new_tokens=8, steps=4, temperature=0)
PROMPTS = [[5, 17, 80], [], [9, 9, 2], [3]]
INPUT = replace(MLM, time_interpretation="input", training_objective="diffusion")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_most_confident_predictions_stay_and_nothing_else_changes() -> None:
    tokens = torch.tensor([[7, 9, 9, 9, 9]])
    masked = torch.tensor([[False, True, True, True, True]])
    probabilities = torch.full((1, 5, 4), 0.1)
    for place, (token, value) in enumerate([(0, 0.99), (1, 0.5), (2, 0.9), (3, 0.3), (0, 0.7)]):
        probabilities[0, place] = (1 - value) / 3
        probabilities[0, place, token] = value
    found = [
        unmask(tokens, masked, probabilities.log(), count, 0.0, _generator())[0].tolist()
        for count in (1, 2, 4)
    ]
    assert found == [[7, 9, 2, 9, 9], [7, 9, 2, 9, 0], [7, 1, 2, 3, 0]]


def test_temperature_draws_from_the_distribution_and_zero_does_not() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(1, 3000, 3)
    tokens = torch.full((1, 3000), 9)
    masked = torch.ones_like(tokens, dtype=torch.bool)
    for temperature in (0.5, 2.0):
        drawn = unmask(tokens, masked, logits, 3000, temperature, _generator())
        shares = torch.bincount(drawn[0], minlength=3) / 3000
        assert torch.allclose(shares, (logits[0, 0] / temperature).softmax(-1), atol=0.03)
    assert (unmask(tokens, masked, logits, 3000, 0.0, _generator()) == 0).all()


class _Recording(ObjectiveFamily):
    """Keeps what the model is fed."""

    fed: list[tuple[torch.Tensor, torch.Tensor]]

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.fed.append((batch["tokens"].clone(), batch["time_step"].clone()))
        return super().auxiliary_inputs(batch)


def _generate(
    parallel: ParallelConfig, sampling: DiffusionSampling
) -> tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    initialize(parallel, seed=1)
    family = _Recording(INPUT)
    family.fed = []
    model = replace(MODEL, init_method_std=0.3)
    (chunk,) = build_model(model, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()])
    return generate_by_unmasking(chunk, [family], PROMPTS, sampling, VOCAB_SIZE), family.fed


SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=0.8),
    "another seed": replace(GREEDY, temperature=0.8, seed=5),
    "more steps than tokens": replace(GREEDY, steps=100),
}


Generated = dict[str, tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]]


def generate_all(parallel: ParallelConfig) -> Generated:
    """By sampling: the tokens, and what the model was fed."""
    return {name: _generate(parallel, sampling) for name, sampling in SAMPLINGS.items()}


@functools.cache
def generated() -> Generated:
    """Those of a single process."""
    found: Generated = run_single(generate_all, ParallelConfig())
    return found


def test_every_mask_becomes_a_token_that_is_no_mask() -> None:
    for found, _ in generated().values():
        assert [len(new) for new in found] == [8] * 4
        assert all(0 <= token < VOCAB_SIZE and token != MASK for new in found for token in new)


def test_a_prompt_stays_and_as_many_masks_go_in_every_step() -> None:
    _, fed = generated()["greedy"]
    alone = [(tokens, steps) for tokens, steps in fed if tokens.size(1) == 9]  # the prompt of one token
    assert [int((tokens == MASK).sum()) for tokens, _ in alone] == [8, 6, 4, 2]
    assert all(tokens[0, 0] == 3 for tokens, _ in alone)
    before = alone[0][0]
    for tokens, _ in alone[1:]:
        assert bool(((tokens == before) | (before == MASK)).all())
        before = tokens
    for tokens, steps in alone:
        share = float((tokens == MASK).double().mean())
        assert abs(float(mask_fraction(INPUT, steps)[0]) - min(share, 0.9)) < 0.01
    lengths = [tuple(tokens.shape) for tokens, _ in generated()["more steps than tokens"][1]]
    assert lengths.count((1, 9)) == 8 and lengths.count((2, 11)) == 8


def test_what_follows_a_stop_token_is_left_out() -> None:
    whole = generated()["greedy"][0]
    stop = whole[0][3]
    cut_off, _ = run_single(_generate, ParallelConfig(), replace(GREEDY, stop_tokens=(stop,)))
    assert cut_off[0] == whole[0][: whole[0].index(stop)]


def _by_a_causal_model() -> str:
    initialize(ParallelConfig(), seed=1)
    family = ObjectiveFamily(replace(MLM, training_objective="clm"))
    (chunk,) = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)
    with pytest.raises(ValueError, match="--sampler diffusion") as error:
        generate_by_unmasking(chunk, [family], PROMPTS, GREEDY, VOCAB_SIZE)
    return str(error.value)


def test_a_model_that_was_not_trained_on_masks_is_refused() -> None:
    assert "requires a model trained on masked tokens" in run_single(_by_a_causal_model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_name_their_flag(name: str, value: float) -> None:
    flag = {"steps": "--diffusion-steps"}.get(name, "--" + name.replace("_", "-"))
    with pytest.raises(ValueError, match=f"{flag} {value}"):
        DiffusionSampling(**{name: value})  # type: ignore[arg-type]
