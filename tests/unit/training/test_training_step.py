"""One step: what is skipped changes nothing, masks and accumulation count as they should, AdamW is AdamW."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch

SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.3, lr_decay_style="cosine", min_lr=1e-4)
MODEL = replace(TINY, disable_bias_linear=False)
"""With biases, which are not decayed."""


def make_stepper(
    parallel: ParallelConfig, *, micro_batch_size: int = 1, clip_grad: float = 1.0, global_batch_size: int = 4
) -> tuple[list[GPTModel], Stepper]:
    """A tiny model and its stepper at this layout."""
    initialize(parallel, seed=1)
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1)
    wrapped = wrap_model(chunks, parallel)
    optimizer = build_optimizer(SETTINGS, parallel, wrapped, [])
    scheduler = build_scheduler(SETTINGS, TrainingConfig(train_iters=10), optimizer, global_batch_size)
    stepper = Stepper(
        wrapped,
        [],
        optimizer,
        scheduler,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        clip_grad=clip_grad,
    )
    return chunks, stepper


def snapshot(chunks: list[GPTModel], stepper: Stepper) -> dict[str, torch.Tensor]:
    """Copies of all parameters, optimizer moments, and the schedule."""
    state = {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    inner = [o.optimizer for o in getattr(stepper.optimizer, "chained_optimizers", [stepper.optimizer])]
    for index, values in enumerate(v for optimizer in inner for v in optimizer.state.values()):
        state |= {f"state {index} {key}": torch.as_tensor(value).clone() for key, value in values.items()}
    for index, group in enumerate(stepper.optimizer.param_groups):
        state[f"group {index}"] = torch.tensor([group["lr"], group["weight_decay"]])
    state["schedule"] = torch.tensor(stepper.scheduler.num_steps)
    return state


def test_masked_labels_get_no_gradient() -> None:
    for name, difference in run_single(_gradients_under_other_labels).items():
        assert difference == 0.0, name


def _gradients_under_other_labels() -> dict[str, float]:
    """Differences of gradients between two batches whose labels differ only where the mask is 0."""
    gradients = []
    for shift in (0, 1):
        chunks, stepper = make_stepper(ParallelConfig(), clip_grad=0.0)
        batches = list(islice(synthetic_batches(MODEL.seq_length), 4))
        for batch in batches:
            batch["loss_mask"][0, ::3] = 0.0
            masked = batch["loss_mask"] == 0
            other = (batch["labels"] + shift) % VOCAB_SIZE
            batch["labels"] = torch.where(masked, other, batch["labels"])
        stepper.forward_backward(iter(batches))
        gradients.append({name: p.main_grad.clone() for name, p in chunks[0].named_parameters()})
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients[0].values() if gradient.dim() > 1)
    return {name: float((gradients[0][name] - other).abs().max()) for name, other in gradients[1].items()}


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    (loss_a, norm_a, state_a), (loss_b, norm_b, state_b) = run_single(_accumulated_and_whole)
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    assert norm_a == pytest.approx(norm_b, rel=1e-5)
    for name, gradient in state_a.items():
        error = torch.linalg.norm(gradient - state_b[name])
        assert error <= 1e-5 * torch.linalg.norm(state_b[name]).clamp(min=1e-4), name


def _accumulated_and_whole() -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    found = []
    for micro_batch_size in (1, 4):
        chunks, stepper = make_stepper(ParallelConfig(), micro_batch_size=micro_batch_size, clip_grad=0.0)
        batches = list(islice(synthetic_batches(MODEL.seq_length), 4))
        if micro_batch_size == 4:
            batches = [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]
        result = stepper.train(iter(batches), 1)
        gradients = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}
        found.append((result.loss, result.grad_norm, gradients))
    return found


def test_loss_is_the_mean_cross_entropy_of_the_global_batch_s_unmasked_tokens() -> None:
    loss, expected = run_single(_masked_loss)
    assert loss == pytest.approx(expected, rel=1e-6)


def _masked_loss() -> tuple[float, float]:
    chunks, stepper = make_stepper(ParallelConfig())
    batches = list(islice(synthetic_batches(MODEL.seq_length), 4))
    counted = []
    for number, batch in enumerate(batches):
        batch["loss_mask"][0, : 2 + number] = 0.0
        with torch.no_grad():
            logits = chunks[0](batch["tokens"], batch["position_ids"], None).double()
        probabilities = logits.log_softmax(-1).gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        counted.append(-probabilities[batch["loss_mask"] > 0])
    return stepper.train(iter(batches), 1).loss, float(torch.cat(counted).mean())


def test_three_steps_equal_a_float64_adamw() -> None:
    assert_adamw(run_single(against_adamw, ParallelConfig()))


def assert_adamw(parameters: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Compares parameters with the reference's, relative to what the steps have changed."""
    for name, (found, expected, start) in parameters.items():
        assert (found - expected).abs().max() <= 2e-4 * (expected - start).abs().max(), name


def against_adamw(parallel: ParallelConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Parameters after three steps, those of the reference fed with the same gradients, and the first ones."""
    chunks, stepper = make_stepper(parallel, clip_grad=0.5)
    parameters = dict(chunks[0].named_parameters())
    start = {name: p.detach().double().clone() for name, p in parameters.items()}
    reference = {name: value.clone() for name, value in start.items()}
    moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in start.items()}
    batches = synthetic_batches(MODEL.seq_length)
    for step in (1, 2, 3):
        taken = list(islice(batches, stepper.num_microbatches))
        gradients = _gradients(chunks[0], parallel, taken)
        norm = math.sqrt(math.fsum(float(g.square().sum()) for g in gradients.values()))
        assert norm > 0.5, "nothing is clipped"
        rate = 1e-2 if step == 1 else _cosine(step - 1)
        for name, gradient in gradients.items():
            decay = 0.0 if gradient.dim() == 1 else 0.3
            _adamw(reference[name], moments[name], gradient * 0.5 / (norm + 1e-6), step, rate, decay)
        assert not stepper.train(iter(taken), step).skipped
    return {name: (p.detach().double(), reference[name], start[name]) for name, p in parameters.items()}


def _gradients(model: GPTModel, parallel: ParallelConfig, taken: list[Batch]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all model copies' batches, by autograd on a copy in fp32."""
    copy = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1)[0]
    copy.load_state_dict(model.state_dict())
    for batch in taken:
        loss = copy(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean()
        (loss / len(taken)).backward()
    found = {}
    for name, parameter in copy.named_parameters():
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_data_parallel_group())
        found[name] = parameter.grad.double() / parallel_state.get_data_parallel_world_size()
    return found


def _cosine(steps: int) -> float:
    """The schedule's rate after `steps` of 10."""
    return 1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + math.cos(math.pi * steps / 10))


def _adamw(
    value: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
    step: int,
    rate: float,
    decay: float,
) -> None:
    """arXiv 1711.05101 in place: decay beside the gradient, moments corrected for their start at zero."""
    first, second = moments
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).add_(gradient.square(), alpha=0.001)
    value.mul_(1 - rate * decay)
    value.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))


def test_single_process_uses_the_fused_kernel() -> None:
    assert run_single(_fused_flags) == [True, True]


def _fused_flags() -> list[bool]:
    _, stepper = make_stepper(ParallelConfig())
    inner = [o.optimizer for o in getattr(stepper.optimizer, "chained_optimizers", [stepper.optimizer])]
    return [bool(group["fused"]) for optimizer in inner for group in optimizer.param_groups]


def test_evaluation_leaves_gradients_and_parameters_alone_and_drops_nothing() -> None:
    before, after, losses = run_single(_evaluated)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert losses[0] == losses[1]


def _evaluated() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    chunks, stepper = make_stepper(ParallelConfig())
    before = snapshot(chunks, stepper)
    losses = [stepper.evaluate(lambda: synthetic_batches(MODEL.seq_length), 2)["lm loss"] for _ in range(2)]
    return before, snapshot(chunks, stepper), losses


def test_a_decoupled_rate_moves_the_embedding_and_the_output_layer_and_lr_all_others() -> None:
    for name, change in run_single(_first_moves).items():
        rate = 7e-3 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else 1e-3
        assert change.max() == pytest.approx(rate, rel=1e-3), name


def _first_moves() -> dict[str, torch.Tensor]:
    """How far Adam's first step moves each parameter: by the rate, wherever the gradient is much larger than epsilon.

    The rates fall from 1e-1 and 7e-1 by a linear decay, of which the first step has 99 hundredths behind it.
    """
    initialize(ParallelConfig(), seed=1)
    model = replace(MODEL, untie_embeddings_and_output_weights=True)
    (chunk,) = chunks = build_model(model, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)
    wrapped = wrap_model(chunks, ParallelConfig())
    settings = OptimizerSettings(lr=1e-1, decoupled_lr=7e-1, weight_decay=0.0)
    optimizer = build_optimizer(settings, ParallelConfig(), wrapped, [])
    scheduler = build_scheduler(settings, TrainingConfig(train_iters=100), optimizer, 4)
    scheduler.step(increment=99 * 4)
    stepper = Stepper(
        wrapped, [], optimizer, scheduler, global_batch_size=4, micro_batch_size=1, clip_grad=0.0
    )
    start = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    assert stepper.train(synthetic_batches(model.seq_length), 1).learning_rate == pytest.approx(1e-3)
    return {name: (p.detach() - start[name]).abs() for name, p in chunk.named_parameters()}


@pytest.mark.parametrize(("level", "calls"), [(0, []), (1, [0]), (2, [0, 1])])
def test_unused_memory_is_given_back_before_the_update_and_after_it_as_the_level_says(
    level: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_single(_emptied, level, monkeypatch) == calls


def _emptied(level: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call in one step that empties the cache, how many updates were done before it."""
    _, stepper = make_stepper(ParallelConfig())
    stepper.empty_memory_level = level
    found: list[int] = []

    def updates() -> int:
        counts = [
            state.get("step", 0) for state in stepper.optimizer.chained_optimizers[0].optimizer.state.values()
        ]
        return int(max(counts, default=0))

    # A CPU has no such cache: what can be observed is when it would be emptied.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(updates()))
    stepper.train(synthetic_batches(MODEL.seq_length), 1)
    return found
