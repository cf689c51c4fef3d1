"""The gemma4 preset against Hugging Face's own Gemma 4 modules with the same random weights: forward and gradients."""

from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_extension import PerLayerExtension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

LAYERS, HIDDEN, WIDTH, VOCAB, SEQUENCE, BATCH = 3, 48, 16, 40, 7, 2
EPS = 1e-6


class _Nothing(torch.nn.Module):
    """In place of attention and MLP: what is left of Gemma's layer is the per-layer block and the layer scalar."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.is_attention else zero


def _gemma() -> Any:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=HIDDEN,
        hidden_size_per_layer_input=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=EPS,
        num_kv_shared_layers=0,
        pad_token_id=0,
    )
    torch.manual_seed(11)
    model: Any = Gemma4TextModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.3)
        for layer in model.layers:
            layer.layer_scalar.uniform_(0.5, 1.5)
            layer.self_attn, layer.mlp = _Nothing(True), _Nothing(False)
    return model


def _ours(gemma: Any) -> GPTModel:
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, seq_length=SEQUENCE, norm_epsilon=EPS
    )
    settings = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=WIDTH
    )
    extension = PerLayerExtension(settings, settings.rows(VOCAB))
    ours: Any
    (ours,) = build_model(model, ParallelConfig(), vocab_size=VOCAB, seed=1, extensions=[extension])
    with torch.no_grad():
        for mine, theirs in _pairs(ours, gemma).values():
            mine.copy_(theirs)
        for layer, theirs in zip(ours.decoder.layers, gemma.layers, strict=True):
            layer.after_mlp.layer_scalar.copy_(theirs.layer_scalar)
    return ours


def _pairs(ours: Any, gemma: Any, grad: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our parameter and the part of theirs that it stands for, or their gradients."""

    def of(parameter: Any) -> Any:
        return parameter.grad if grad else parameter

    pairs = {"norm": (of(ours.per_layer.norm.weight), of(gemma.per_layer_projection_norm.weight))}
    for number, (layer, theirs) in enumerate(zip(ours.per_layer.layers, gemma.layers, strict=True)):
        part = slice(number * WIDTH, (number + 1) * WIDTH)
        block = ours.decoder.layers[number].after_mlp
        pairs |= {
            f"table {number}": (of(layer.embedding.weight), of(gemma.embed_tokens_per_layer.weight)[:, part]),
            f"context {number}": (
                of(layer.context_projection.weight),
                of(gemma.per_layer_model_projection.weight)[part],
            ),
            f"gate {number}": (of(block.gate.weight), of(theirs.per_layer_input_gate.weight)),
            f"projection {number}": (of(block.projection.weight), of(theirs.per_layer_projection.weight)),
            f"post-norm {number}": (of(block.post_norm.weight), of(theirs.post_per_layer_input_norm.weight)),
        }
    return pairs


def _run_both() -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    initialize(ParallelConfig(), seed=1)
    gemma = _gemma()
    ours = _ours(gemma)
    tokens = torch.randint(1, VOCAB, (BATCH, SEQUENCE))
    embeddings = [
        torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(2)) for _ in range(2)
    ]
    for embedding in embeddings:
        embedding.requires_grad_()

    per_layer = gemma.project_per_layer_inputs(
        embeddings[0], gemma.get_per_layer_inputs(tokens, embeddings[0])
    )
    theirs = embeddings[0]
    for number, layer in enumerate(gemma.layers):
        theirs = layer(theirs, per_layer_input=per_layer[:, :, number])

    word_embedding = embeddings[1].transpose(0, 1)
    streams = ours.per_layer({"per_layer_ids": tokens}, {"word_embedding": word_embedding})
    auxiliary: AuxiliaryInputs = ours.auxiliary
    layer_inputs = auxiliary.open(auxiliary.pack(streams), word_embedding)
    output = word_embedding
    for layer in ours.decoder.layers:
        output = layer.after_mlp(output, layer_inputs)
    output = output.transpose(0, 1)

    direction = torch.randn(output.shape)
    (theirs * direction).sum().backward()
    (output * direction).sum().backward()
    pairs = _pairs(ours, gemma, grad=True)
    mine, other = (embedding.grad for embedding in reversed(embeddings))
    assert mine is not None and other is not None
    pairs["word embedding"] = (mine, other)
    pairs["output"] = (output.detach(), theirs.detach())
    pairs["vectors"] = (
        streams["per_layer"].detach().view(LAYERS, SEQUENCE, BATCH, WIDTH),
        per_layer.detach().permute(2, 1, 0, 3),
    )
    count = sum(getattr(parameter, "per_layer", False) for parameter in ours.parameters())
    return pairs, count


def test_the_gemma4_preset_equals_hugging_faces_modules_forward_and_gradient() -> None:
    (pairs, count) = run_single(_run_both)
    assert len(pairs) == count + 3
    for name, (ours, theirs) in pairs.items():
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
