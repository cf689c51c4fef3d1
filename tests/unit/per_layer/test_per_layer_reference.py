"""PLE in a model of two layers against the float64 reference: logits, and the gradient of every parameter of PLE."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_block import ACTIVATIONS, PerLayerBlock
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_extension import PerLayerExtension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.references import (
    reference_activation,
    reference_per_layer_block,
    reference_per_layer_vector,
)
from megatron_ext.testing.run_single import run_single

METHODS = ("scaled_add", "concat", "gated")
POSITIONS = ("before_layer", "after_mlp")
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=8,
    position_embedding_type="none",
    disable_bias_linear=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.1,
    untie_embeddings_and_output_weights=True,
)
VOCAB, ROWS, WIDTH = 64, 20, 8
CASES = [
    f"{method} {activation} {position}"
    for method, activation, position in itertools.product(METHODS, ACTIVATIONS, POSITIONS)
]
CASES += [f"{method} silu before_layer trigram_hash" for method in METHODS]
Gradients = dict[str, torch.Tensor]
Outcome = tuple[torch.Tensor, Gradients]


def _settings(case: str) -> PerLayerConfig:
    names = (
        "per_layer_combination_method",
        "per_layer_gate_activation",
        "per_layer_position",
        "per_layer_strategy",
    )
    choices: dict[str, Any] = dict(zip(names, case.split(), strict=False))
    return PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_vocab_size=ROWS,
        per_layer_hidden_size=WIDTH,
        per_layer_embed_scale=1.5,
        **choices,
    )


def _build(settings: PerLayerConfig) -> GPTModel:
    extension = PerLayerExtension(settings, settings.rows(VOCAB))
    (model,) = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB, seed=7, extensions=[extension])
    with torch.no_grad():  # norms that are not one, so that a forgotten weight is seen
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def _blocks(model: GPTModel) -> list[PerLayerBlock]:
    return [module for module in model.modules() if isinstance(module, PerLayerBlock)]


def _outcome(model: GPTModel, hidden_states: torch.Tensor, direction: torch.Tensor) -> Outcome:
    model.zero_grad()
    (hidden_states * direction).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and getattr(parameter, "per_layer", False)
    }
    gradients["word embedding"] = model.embedding.word_embeddings.weight.grad.clone()
    return hidden_states.detach(), gradients


def _ours(
    model: GPTModel, tokens: torch.Tensor, ids: torch.Tensor | None, direction: torch.Tensor
) -> Outcome:
    auxiliary_inputs = {} if ids is None else {"per_layer_ids": ids}
    logits = model(tokens, torch.zeros_like(tokens), None, auxiliary_inputs=auxiliary_inputs)
    return _outcome(model, logits, direction)


def _reference(
    model: GPTModel, tokens: torch.Tensor, ids: torch.Tensor | None, direction: torch.Tensor
) -> Outcome:
    settings, inputs = model.per_layer.settings, model.per_layer
    embedding = model.embedding(tokens, torch.zeros_like(tokens))
    hidden = embedding
    for layer, weights, block in zip(model.decoder.layers, inputs.layers, _blocks(model), strict=True):
        combination = getattr(weights, "combination", None)
        vector = reference_per_layer_vector(
            embedding.flatten(0, 1).double(),
            None if ids is None else ids.transpose(0, 1).flatten(0, 1),
            weights.embedding.weight.double(),
            weights.context_projection.weight.double(),
            inputs.norm.weight.double(),
            None if combination is None else combination.weight.double(),
            method=settings.per_layer_combination_method,
            embed_scale=settings.per_layer_embed_scale,
            eps=MODEL.norm_epsilon,
        )
        if settings.per_layer_position == "before_layer":
            hidden = _reference_block(block, hidden, vector)
        hidden, _ = TransformerLayer.forward(layer, hidden_states=hidden, attention_mask=None)
        if settings.per_layer_position == "after_mlp":
            hidden = _reference_block(block, hidden, vector)
    logits, _ = model.output_layer(model.decoder.final_layernorm(hidden))
    return _outcome(model, logits.transpose(0, 1), direction)


def _reference_block(block: PerLayerBlock, hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    output = reference_per_layer_block(
        hidden.flatten(0, 1).double(),
        vector,
        block.gate.weight.double(),
        block.projection.weight.double(),
        block.post_norm.weight.double(),
        activation=block.settings.per_layer_gate_activation,
        eps=MODEL.norm_epsilon,
    )
    return output.view(hidden.shape).float()


def _compare_all(with_ids: bool) -> dict[str, tuple[Outcome, Outcome]]:
    initialize(ParallelConfig(), seed=7)
    found = {}
    for case in CASES:
        model = _build(_settings(case))
        torch.manual_seed(3)
        tokens = torch.randint(VOCAB, (2, MODEL.seq_length))
        rows_per_token = model.per_layer.settings.rows_per_token
        shape = tokens.shape if rows_per_token == 1 else (*tokens.shape, rows_per_token)
        ids = torch.randint(ROWS, shape) if with_ids else None
        direction = torch.randn(2, MODEL.seq_length, 128)
        found[case] = (_ours(model, tokens, ids, direction), _reference(model, tokens, ids, direction))
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[Outcome, Outcome]]:
    return run_single(_compare_all, True)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_the_float64_reference(
    outcomes: dict[str, tuple[Outcome, Outcome]], case: str
) -> None:
    (logits, gradients), (expected_logits, expected_gradients) = outcomes[case]
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    per_layer = (
        6 if "scaled_add" in case else 7
    )  # table, context, (combination), gate, projection, post-norm; + shared
    assert len(gradients) == MODEL.num_layers * (per_layer - 1) + 2
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=2e-5 * scale, msg=name)


def _without_ids() -> dict[str, tuple[Outcome, Outcome]]:
    global CASES
    CASES = [f"{method} silu before_layer" for method in METHODS]
    return _compare_all(with_ids=False)


def test_without_ids_the_projected_word_embedding_alone_is_used() -> None:
    for (logits, _), (expected, _) in run_single(_without_ids).values():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def _dropout_facts() -> tuple[bool, bool, bool]:
    initialize(ParallelConfig(), seed=7)
    model = _build(replace(_settings("scaled_add silu before_layer"), per_layer_projection_dropout=0.5))
    tokens = torch.randint(VOCAB, (2, MODEL.seq_length))
    arguments = (tokens, torch.zeros_like(tokens), None, {"per_layer_ids": tokens % ROWS})
    first, second = model(*arguments), model(*arguments)
    model.eval()
    return (
        torch.equal(first, second),
        torch.equal(model(*arguments), model(*arguments)),
        bool(first.isfinite().all()),
    )


def test_projection_dropout_acts_in_training_only() -> None:
    assert [run_single(_dropout_facts)] == [(False, True, True)]


def test_an_activation_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="activation tanh: has no reference"):
        reference_activation(torch.zeros(1), "tanh")
