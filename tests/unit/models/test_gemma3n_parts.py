"""AltUp and Laurel compute what transformers' Gemma 3n modules compute, forward and backward."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.engine_config import build_transformer_config
from megatron_ext.models.gemma3n.altup import AltUp, JoinStreams, StartStreams
from megatron_ext.models.gemma3n.laurel import Laurel
from megatron_ext.models.ops.norm import RMSNorm
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

HIDDEN, STREAMS, RANK, EPS = 16, 4, 3, 1e-6
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _configs(clip: float) -> tuple[TransformerConfig, Any]:
    from transformers import Gemma3nTextConfig

    initialize(ParallelConfig(), seed=1)
    model = ModelConfig(num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, seq_length=8)
    theirs = Gemma3nTextConfig(
        hidden_size=HIDDEN,
        altup_num_inputs=STREAMS,
        altup_coef_clip=clip,
        laurel_rank=RANK,
        num_attention_heads=2,
        rms_norm_eps=EPS,
    )
    return build_transformer_config(model, ParallelConfig()), theirs


def _same_values(pairs: list[tuple[torch.Tensor, torch.Tensor]], std: float) -> None:
    """Fills parameters of theirs at random, and copies them to ours."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.normal_(1.0 if theirs.dim() == 1 else 0.0, std, generator=generator)
            ours.copy_(theirs)


def _streams() -> list[torch.Tensor]:
    values = torch.randn(STREAMS * 5, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    return [values.clone().requires_grad_() for _ in range(2)]


def _layer(values: torch.Tensor) -> torch.Tensor:
    return values * 0.5 + values.roll(1, -1).sin()


def _altup(clip: float, trains: bool) -> Pairs:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

    config, their_config = _configs(clip)
    ours = AltUp(config, EPS, streams=STREAMS, coef_clip=clip).train(trains)
    theirs: Any = Gemma3nTextAltUp(their_config).train(trains)
    pairs = {
        "router": (ours.router, theirs.modality_router.weight),
        "norm": (ours.router_norm.weight, theirs.router_norm.weight),
        "prediction": (ours.prediction, theirs.prediction_coefs.weight),
        "correction": (ours.correction, theirs.correction_coefs.weight),
    }
    _same_values(list(pairs.values()), 1.0)
    mine, other = _streams()
    output = ours(mine, _layer)
    predicted = theirs.predict(other.unflatten(0, (STREAMS, -1)).transpose(1, 2))
    expected = theirs.correct(predicted, _layer(predicted[0])).transpose(1, 2).flatten(0, 1)
    return _compared(pairs, (output, expected), (mine, other))


def _compared(
    parameters: Pairs, outputs: tuple[torch.Tensor, torch.Tensor], inputs: tuple[torch.Tensor, torch.Tensor]
) -> Pairs:
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    for output in outputs:
        (output * direction).sum().backward()
    found = {"output": outputs, "input": inputs, **parameters}
    return {
        name: (ours.detach(), theirs.detach()) if name == "output" else (_grad(ours), _grad(theirs))
        for name, (ours, theirs) in found.items()
    }


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _assert_same(pairs: Pairs) -> None:
    for name, (ours, theirs) in pairs.items():
        assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs), name


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("clip", [120.0, 0.5])
def test_altup_predicts_and_corrects_as_transformers_does(clip: float, trains: bool) -> None:
    _assert_same(run_single(_altup, clip, trains))


def _laurel() -> Pairs:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextLaurelBlock

    config, their_config = _configs(120.0)
    ours = Laurel(config, EPS, rank=RANK)
    theirs: Any = Gemma3nTextLaurelBlock(their_config)
    pairs = {
        "left": (ours.left, theirs.linear_left.weight),
        "right": (ours.right, theirs.linear_right.weight),
        "norm": (ours.post_norm.weight, theirs.post_laurel_norm.weight),
    }
    _same_values(list(pairs.values()), 0.5)
    mine, other = _streams()
    return _compared(pairs, (ours(mine), theirs(other)), (mine, other))


def test_laurel_is_that_of_transformers() -> None:
    _assert_same(run_single(_laurel))


def _zero_embedding() -> tuple[torch.Tensor, torch.Tensor]:
    config, _ = _configs(120.0)
    start = StartStreams(config, STREAMS)
    join = JoinStreams(config, HIDDEN, EPS, streams=STREAMS, norm=RMSNorm)
    with torch.no_grad():
        start.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
        join.weight.copy_(start.weight)
    embedding = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    embedding[0] = 0.0
    embedding.requires_grad_()
    streams = start(embedding)
    join(streams).sum().backward()
    assert embedding.grad is not None
    return streams.detach(), embedding.grad


def test_the_streams_of_an_embedding_have_its_magnitude_and_one_of_zeros_has_a_finite_gradient() -> None:
    streams, gradient = run_single(_zero_embedding)
    magnitudes = streams.unflatten(0, (STREAMS, -1)).norm(dim=-1)
    torch.testing.assert_close(magnitudes, magnitudes[:1].expand_as(magnitudes))
    assert gradient.isfinite().all() and not streams.unflatten(0, (STREAMS, -1))[:, 0].any()
