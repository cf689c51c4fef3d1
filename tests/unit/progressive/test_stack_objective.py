"""Objectives: what the model is fed and asked, what it may see, and that it learns; at every parallel layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.perplexity import evaluate_perplexity
from megatron_ext.progressive.objectives.stack_objective import ACCURACY, StackObjective, reserve_mask_token
from megatron_ext.progressive.objectives.time_embedding import sinusoidal
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import ListTokenizer, write_dataset
from megatron_ext.testing.tiny_training import (
    VOCAB_SIZE,
)
from tests.unit.progressive.objective_helpers import MASK, MLM, MODEL, ObjectiveFamily, batches, build_stepper

LENGTH = MODEL.seq_length
INPUT = replace(MLM, time_interpretation="input")
CONFIGS = {
    "clm": replace(MLM, training_objective="clm"),
    "mlm": MLM,
    "mlm sinusoidal time": INPUT,
    "diffusion learned time": replace(
        INPUT, training_objective="diffusion", time_encoding_type="learned", num_time_steps=20
    ),
}


def _objective(config: ProgressiveConfig, fixed: bool = False) -> StackObjective:
    mask = MASK if config.training_objective in ("mlm", "diffusion") else None
    return StackObjective(config, stack_idx=1, seed=1, mask_token_id=mask, fixed_masks=fixed)


def _batch(rows: int = 3) -> dict[str, torch.Tensor]:
    tokens = torch.arange(rows * LENGTH).view(rows, LENGTH) % 80
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(rows, LENGTH),
        "position_ids": torch.arange(LENGTH).expand(rows, LENGTH),
    }


def test_masked_tokens_are_replaced_and_they_alone_count() -> None:
    batch = _batch()
    made = _objective(MLM).make_batch(batch)
    masks = made["masks"]
    assert masks.any() and not masks.all()
    assert (made["tokens"][masks] == MASK).all()
    assert torch.equal(made["tokens"][~masks], batch["tokens"][~masks])
    assert torch.equal(made["labels"], batch["tokens"])
    assert torch.equal(made["loss_mask"], masks.float())
    assert torch.equal(made["combined_masks"], masks.float())
    assert MASK not in batch["tokens"]


def test_diffusion_weights_a_sequence_with_one_over_its_masked_share() -> None:
    made = _objective(CONFIGS["diffusion learned time"]).make_batch(_batch(8))
    share = made["masks"].double().mean(1, keepdim=True)
    expected = made["masks"] / share
    assert torch.allclose(made["loss_mask"].double(), expected)
    assert len(set(share.flatten().tolist())) > 3
    assert set(made["combined_masks"].unique().tolist()) == {0.0, 1.0}


def test_clm_takes_the_datas_labels_or_shifts_and_leaves_the_last_out() -> None:
    batch, objective = _batch(), _objective(CONFIGS["clm"])
    made = objective.make_batch(batch)
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(made[name], batch[name])
    del batch["labels"]
    batch["loss_mask"][:, 3] = 0
    made = objective.make_batch(batch)
    assert torch.equal(made["labels"][:, :-1], batch["tokens"][:, 1:])
    assert made["clm_mask"].tolist() == [[1.0] * (LENGTH - 1) + [0.0]] * 3
    assert torch.equal(made["combined_masks"], made["clm_mask"] * batch["loss_mask"])
    assert torch.equal(made["loss_mask"], made["combined_masks"])


def test_custom_counts_where_the_data_gives_a_target() -> None:
    batch, objective = _batch(), _objective(replace(MLM, training_objective="custom"))
    with pytest.raises(ValueError, match="--training-objective custom"):
        objective.make_batch(batch)
    targets = batch["tokens"].clone()
    targets[:, 5:] = -100
    made = objective.make_batch(batch | {"targets": targets})
    assert made["loss_mask"].tolist() == [[1.0] * 5 + [0.0] * (LENGTH - 5)] * 3
    assert torch.equal(made["labels"][:, :5], targets[:, :5])


def test_documents_stay_apart_in_both_directions() -> None:
    document = torch.tensor([0, 0, 1, 1])
    apart = document.unsqueeze(0) != document.unsqueeze(1)
    ahead = torch.ones(4, 4).triu(1).bool()
    batch = {name: value[:1, :4] for name, value in _batch().items()}
    batch["attention_mask"] = (apart | ahead)[None, None]
    assert torch.equal(_objective(MLM).make_batch(batch)["attention_mask"][0, 0], apart)


def test_aligned_per_layer_data_would_show_what_is_masked() -> None:
    with pytest.raises(ValueError, match="--training-objective mlm: does not support aligned"):
        _objective(MLM).make_batch(_batch() | {"per_layer_ids": torch.zeros(3, LENGTH)})


def test_the_mask_token_is_the_vocabularys_or_a_new_id() -> None:
    plain = ListTokenizer(["<eod>", "a", "b"])
    fingerprint = plain.fingerprint()
    assert reserve_mask_token(plain) == 3
    assert (plain.vocab_size, plain.fingerprint()) == (4, fingerprint)
    known = ListTokenizer(["<eod>", "a", "[MASK]"])
    assert reserve_mask_token(known) == 2 and known.vocab_size == 3
    assert reserve_mask_token(ListTokenizer(["<eod>", "a", "b"]), 2) == 2
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"--mask-token-id {wrong}"):
            reserve_mask_token(ListTokenizer(["<eod>", "a", "b"]), wrong)


def test_sinusoidal_time_is_the_formula_in_float64() -> None:
    steps = torch.tensor([0, 7, 599])
    frequencies = 10000.0 ** (-2 * torch.arange(4).double() / 8)
    angles = steps.double().unsqueeze(1) * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], 1)
    assert torch.allclose(sinusoidal(steps, 8).double(), expected, atol=1e-4)
    assert sinusoidal(steps, 9).shape == (3, 9)


def _seen_by_the_first() -> dict[str, Any]:
    """Does a change of the last token change the first position's logits? And is a mlm learned, and told right?"""
    found: dict[str, Any] = {}
    for name in ("clm", "mlm"):
        _, (chunk,) = build_stepper(ParallelConfig(), ObjectiveFamily(CONFIGS[name]))
        tokens = torch.arange(LENGTH).unsqueeze(0)
        other = tokens.clone()
        other[0, -1] = 77
        positions = torch.arange(LENGTH).unsqueeze(0)
        with torch.no_grad():
            found[name] = [chunk(ids, positions, None)[0, 0] for ids in (tokens, other)]
            allowed = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
            found[f"{name} by mask"] = chunk(tokens, positions, allowed)[0, 0]
    return found


def _learn(prefix: str) -> dict[str, Any]:
    """Losses, what an evaluation gives, a dataset's perplexity, and what the model says of that dataset's tokens."""
    family = ObjectiveFamily(replace(MLM, min_mask_fraction=0.4))
    stepper, chunks = build_stepper(ParallelConfig(), family, lr=3e-3, micro=4)
    data = batches(512, micro=4)
    losses = [stepper.train(data, step).loss for step in range(1, 161)]
    evaluation = stepper.evaluate(lambda: batches(64, seed=5, micro=4), 8)
    tokens = next(batches(1, seed=5))["tokens"][0].tolist()
    write_dataset(prefix, [[[*tokens, tokens[0]]]])
    told = evaluate_perplexity(
        chunks, [family], prefix, sequence_length=LENGTH, micro_batch_size=1, guess=tokens[1]
    )
    made = family.make_batch(_batch(1) | {"tokens": torch.tensor([tokens])})
    with torch.no_grad():
        logits = chunks[0](made["tokens"], made["position_ids"], None)[0]
    masked = made["tokens"][0] == MASK
    asked = torch.tensor(tokens)[masked]
    direct = {
        "loss": torch.nn.functional.cross_entropy(logits[masked], asked),
        "accuracy": (logits[masked].argmax(-1) == asked).double().mean(),
        "guess": (asked == tokens[1]).double().mean(),
    }
    return {
        "losses": losses,
        "evaluation": evaluation,
        "told": told,
        "direct": {name: float(value) for name, value in direct.items()},
    }


def test_a_later_token_changes_an_earlier_logit_in_mlm_and_not_in_clm() -> None:
    found = run_single(_seen_by_the_first)
    assert torch.equal(*found["clm"])
    before, after = found["mlm"]
    assert not torch.allclose(before, after, atol=1e-3)
    # The same attention by another path: a mask that forbids nothing.
    assert torch.allclose(found["clm by mask"], found["mlm"][0], atol=1e-5)
    assert torch.allclose(found["mlm by mask"], found["mlm"][0], atol=1e-5)


def test_a_tiny_mlm_learns_what_the_other_tokens_tell(tmp_path: Path) -> None:
    found = run_single(_learn, str(tmp_path / "held_out"))
    losses, evaluation, told, direct = (found[name] for name in ("losses", "evaluation", "told", "direct"))
    assert sum(losses[-10:]) < 5 * losses[0]
    assert evaluation[ACCURACY] > 0.5  # the most frequent token is right once in 24 times
    assert evaluation["lm loss"] < 0.6 * losses[0]
    # A tool's loss and accuracies too are those of masked tokens.
    assert told.tokens == round(LENGTH * 0.4)
    assert told.loss == pytest.approx(direct["loss"], rel=1e-5)
    assert told.values == {ACCURACY: pytest.approx(direct["accuracy"])}
    assert told.guess_accuracy == pytest.approx(direct["guess"])


def test_time_steps_reach_the_batch() -> None:
    made = _objective(INPUT).make_batch(_batch(6))
    assert made[TIME_STEP].shape == (6,) and made[TIME_STEP].max() < INPUT.resolved_num_time_steps
    assert TIME_STEP not in _objective(CONFIGS["clm"]).make_batch(_batch())
    assert VOCAB_SIZE > MASK
