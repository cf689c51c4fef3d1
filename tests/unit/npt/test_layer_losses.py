"""The losses of a training step against what follows from the layers' plain inputs and outputs, and from logits."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops import cross_entropy
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.fidelity_loss import kl_divergence, logits_mse
from megatron_ext.npt.objective.layer_losses import _per_token
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.engine.microbatches import run_microbatches

MODEL = replace(TINY, init_method_std=0.2, make_vocab_size_divisible_by=VOCAB_SIZE)
NPT_LAYERS = (1, 3)
MODULE = NPTModuleConfig(
    npt_layers="1,3", np_form="outer_product", np_rank=4, np_init_scale=0.5, num_np_components=2
)
WEIGHTS = {
    "equivalence_weight": 1.0,
    "direct_mlp_weight": 10.0,
    "fidelity_weight": 2.0,
    "regularization_weight": 0.3,
}


def _inputs_and_outputs(
    model: GPTModel, batch: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], torch.Tensor]:
    """What goes into every layer and comes out, and its attention's output; and the logits [b, s, V]."""
    seen: dict[str, Any] = {"in": [], "out": [], "attention": []}
    hooks = []
    for layer in model.decoder.layers:
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: seen["in"].append(kwargs["hidden_states"]), with_kwargs=True
            ),
            layer.register_forward_hook(lambda _, args, out: seen["out"].append(out[0])),
            layer.self_attention.register_forward_hook(lambda _, args, out: seen["attention"].append(out[0])),
        ]
    with torch.no_grad():
        logits = model(batch["tokens"], batch["position_ids"], None)
    for hook in hooks:
        hook.remove()
    return seen, logits


def _step(stage: str, residual: str, kind: str, losses: str) -> dict[str, float]:
    """Losses as a training step finds them, and as they follow from inputs and outputs (`expected ...`)."""
    initialize(ParallelConfig(), seed=1)
    module = replace(MODULE, np_residual=residual)  # type: ignore[arg-type]
    training = NPTTrainingConfig(
        mode="multi_layer",
        curriculum_stages=f"{stage}:1",
        equivalence_loss=kind,  # type: ignore[arg-type]
        layer_losses=losses,  # type: ignore[arg-type]
        **WEIGHTS,  # type: ignore[arg-type]
    )
    family = NPTFamily(module, training, total_steps=1)
    chunks = build_model(
        MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()]
    )
    family.prepare_model(chunks)
    batch = next(synthetic_batches(MODEL.seq_length))
    family.begin_step(chunks, 1)
    output_loss = family.output_loss()
    assert output_loss is not None
    outputs = run_microbatches(
        list(chunks), [family], [batch], output_loss,
        forward_only=False, prepare=lambda batches: family.prepare_batches(chunks, [family], batches),
    )  # fmt: skip
    means = {name: float(total / weight) for name, (total, weight) in outputs[0].items()}
    found = means | {name: float(value) for name, value in LayerLosses.take().items()}
    family.begin_step(chunks, None)
    return found | _expected(chunks[0], batch, stage, residual, kind, losses)


def _expected(
    model: GPTModel, batch: dict[str, torch.Tensor], stage: str, residual: str, kind: str, losses: str
) -> dict[str, float]:
    with deactivated([model]):
        teacher, base_logits = _inputs_and_outputs(model, batch)
    student, _ = _inputs_and_outputs(model, batch)
    found: dict[str, float] = {}
    hidden = student["in"][0]
    for number, layer in enumerate(model.decoder.layers):
        if number in NPT_LAYERS and stage == "teacher":
            hidden = teacher["in"][number]
        rotary = model.rotary_pos_emb(MODEL.seq_length)
        run = functools.partial(layer, attention_mask=None, rotary_pos_emb=rotary)
        with torch.no_grad():
            output = run(hidden_states=hidden)[0]
            if number in NPT_LAYERS:
                with deactivated([model]):
                    base = run(hidden_states=hidden)[0]
                    attention = layer.attend(hidden, attention_mask=None)
                found |= _of_layer(
                    number,
                    hidden.double(),
                    attention.double(),
                    output.double(),
                    base.double(),
                    residual,
                    kind,
                    losses,
                )
        hidden = output
    with torch.no_grad():
        logits = model.output_layer(
            model.decoder.final_layernorm(hidden), weight=model.shared_embedding_or_output_weight()
        )[0]
    log_p, log_q = base_logits.double().log_softmax(-1), logits.transpose(0, 1).double().log_softmax(-1)
    found["expected fidelity_loss"] = float(
        F.kl_div(log_q, log_p, log_target=True, reduction="sum") / MODEL.seq_length
    )
    found["expected lm loss"] = float(F.nll_loss(log_q.flatten(0, 1), batch["labels"].flatten()))
    return found


def _of_layer(
    number: int,
    h: torch.Tensor,
    a: torch.Tensor,
    output: torch.Tensor,
    base: torch.Tensor,
    residual: str,
    kind: str,
    losses: str,
) -> dict[str, float]:
    carried = h + a if residual == "keep" else h
    target = base - carried
    errors = (output - base).square().mean(-1)
    if losses == "local":
        direct = (errors / target.square().mean(-1)).mean()
        squares = (errors / base.square().mean(-1)).mean()
    else:
        direct = errors.mean() / (target.square().mean().sqrt() + 1e-6)
        squares = errors.mean()
    equivalence = squares if kind == "mse" else (1 - F.cosine_similarity(output, base, dim=-1)).mean()
    return {
        f"expected mlp_direct_loss/layer_{number}": float(direct),
        f"expected equivalence_loss/layer_{number}": float(equivalence),
    }


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("residual", ["keep", "drop"])
@pytest.mark.parametrize("stage", ["teacher", "student"])
@pytest.mark.parametrize("losses", ["local", "document"])
def test_a_step_finds_the_losses_that_follow_from_inputs_and_outputs(
    losses: str, stage: str, residual: str, kind: str
) -> None:
    found = run_single(_step, stage, residual, kind, losses)
    expected = {
        name.removeprefix("expected "): value for name, value in found.items() if name.startswith("expected")
    }
    assert len(expected) == 6
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    for layer in NPT_LAYERS:
        total = 10 * found[f"mlp_direct_loss/layer_{layer}"] + found[f"equivalence_loss/layer_{layer}"]
        total += 0.3 * found[f"regularization_loss/layer_{layer}"]
        share = 1 / len(NPT_LAYERS) if losses == "local" else 1
        assert found[f"npt_loss/layer_{layer}"] == pytest.approx(share * total, rel=1e-5)


def _gradients(form: str, losses: str, weights: str) -> dict[int, torch.Tensor]:
    """The gradients of each NPT layer's factors, of losses of the layers alone with these weights."""
    initialize(ParallelConfig(), seed=1)
    module = NPTModuleConfig(
        npt_layers="1,3",
        np_form=form,  # type: ignore[arg-type]
        np_target="gate+up+down",
        np_rank=4,
        np_init_scale=0.5,
    )
    training = NPTTrainingConfig(
        mode="lm",
        lm_weight=0.0,
        direct_mlp_weight=2.0,
        equivalence_weight=1.0,
        regularization_weight=0.1,
        layer_losses=losses,  # type: ignore[arg-type]
        layer_weights=weights,
    )
    family = NPTFamily(module, training, total_steps=1)
    chunks = build_model(
        MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()]
    )
    family.prepare_model(chunks)
    family.begin_step(chunks, 1)
    batch = next(synthetic_batches(MODEL.seq_length))
    output_loss = family.output_loss()
    assert output_loss is not None
    run_microbatches(list(chunks), [family], [batch], output_loss, forward_only=False)
    LayerLosses.take()
    return {
        number: torch.cat([p.grad.flatten() for p in slot.parameters() if p.grad is not None])
        for number, slot in np_modules(chunks).items()
    }


@pytest.mark.parametrize("form", ["low_rank", "outer_product", "key_value"])
def test_local_losses_of_a_layer_do_not_train_the_layers_below_and_the_documents_do(form: str) -> None:
    upper = {losses: run_single(_gradients, form, losses, "0,1") for losses in ("local", "document")}
    assert not upper["local"][1].any() and upper["document"][1].any()
    assert upper["local"][3].any() and upper["document"][3].any()
    # The weights 1,1 are divided by their sum, so that both layers have half of the gradient that they have alone.
    lower, both = (run_single(_gradients, form, "local", weights) for weights in ("1,0", "1,1"))
    assert torch.allclose(both[1], lower[1] / 2, rtol=1e-5, atol=1e-9)
    assert torch.allclose(both[3], upper["local"][3] / 2, rtol=1e-5, atol=1e-9)


def _losses_with_a_massive_token(factor: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    target, output = torch.randn(2, 6, 1, 8, generator=generator)
    scale = torch.ones(6, 1, 1)
    scale[2] = factor
    errors = (scale * (output - target)).square()
    return [float(_per_token(errors, scale * target)), float(errors.mean())]


def test_one_massive_token_does_not_outweigh_the_others_in_a_local_loss() -> None:
    plain, massive = _losses_with_a_massive_token(1.0), _losses_with_a_massive_token(1000.0)
    assert massive[0] == pytest.approx(plain[0], rel=1e-5)
    assert massive[1] > 1e4 * plain[1]


def test_a_token_whose_target_is_zero_gives_a_finite_local_loss() -> None:
    zeros = torch.zeros(2, 1, 4)
    assert float(_per_token(zeros, zeros)) == 0.0


def _divergences() -> list[float]:
    initialize(ParallelConfig(), seed=1)
    generator = torch.Generator().manual_seed(0)
    base, model = torch.randn(2, 5, 3, 40, generator=generator) * 3
    model.requires_grad_()
    group = torch.distributed.group.WORLD
    found = []
    for measure in (kl_divergence, logits_mse):
        twin = model.detach().double().requires_grad_()
        if measure is kl_divergence:
            values = F.kl_div(
                twin.log_softmax(-1), base.double().log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        else:
            values = (twin - base.double()).square().mean(-1)
        weights = torch.rand(5, 3, generator=generator)
        ours = measure(base, model, group)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad((ours * weights).sum(), model)
        (expected,) = torch.autograd.grad((values * weights).sum(), twin)
        found += [float((ours - values).detach().abs().max()), float((gradient - expected).abs().max())]
    return found


@pytest.mark.parametrize("rows", [4, 1000])
def test_divergences_and_their_gradients_equal_torch_in_float64(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.BLOCK_BYTES, "cpu", rows * 40 * 4)  # 15 tokens: four blocks, and one
    assert max(run_single(_divergences)) < 1e-5
