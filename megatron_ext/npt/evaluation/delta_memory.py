"""Measures how much memory the NP components of one layer need in a training step, in two forms.

In the materialised form, every token's weight update (delta) is built as a matrix; in the factored form it is not.
The MLP of one layer runs with frozen base weights. Two values are measured: the memory kept for the backward pass,
and the peak during the forward and backward passes. Each is measured at two token counts, so that weights and their
gradients cancel in the difference; the base MLP's memory is then subtracted. If f is proportional to h, the result in
bytes per token is

    materialised    c h^2           deltas and their gradients
    factored        c0 + c1 h       products of size r, temporary gradients of size h

The constants c, c0 and c1 are fitted by least squares to the measured model sizes; they project the memory at other
sizes, for example of a 7B model. All L layers hold their kept memory at the same time, but only one layer is at its
peak: the total is L kept + (peak - kept).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.materialised_deltas import materialised_mlp
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform.allocations import AllocationCounter

_TOKENS = {"base": (512, 1024), "factored": (512, 1024), "materialised": (2, 4)}
"""Maps each form to two token counts. They are large enough that activations exceed the gradients of the weights."""


@dataclass(frozen=True)
class TokenBytes:
    """Memory, in bytes per token, that one converted layer needs in addition to its base MLP."""

    kept: float
    """Bytes kept from the forward pass to the backward pass."""

    peak: float
    """Peak number of bytes during a training step, including the bytes that are kept."""

    def of(self, tokens: int, layers: int) -> float:
        """Returns the peak bytes of `layers` layers for a micro-batch of `tokens` tokens."""
        return tokens * (layers * self.kept + self.peak - self.kept)


@dataclass(frozen=True)
class SizeMemory:
    """Memory of the materialised and of the factored form at one model size."""

    hidden_size: int
    ffn_hidden_size: int
    factored: TokenBytes
    materialised: TokenBytes


def measure_memory(
    settings: NPTModuleConfig, hidden_size: int, ffn_hidden_size: int, bf16: bool = False
) -> SizeMemory:
    """Measures the memory of both forms at one model size, in one process; call `process_groups.initialize` first.

    Args:
        settings: form, target and rank of the NP components; the choice of layers is ignored.
        hidden_size: the model's hidden size h.
        ffn_hidden_size: the inner size f of the MLP.
        bf16: whether weights and activations are in bfloat16 instead of fp32.
    """
    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=1,
        seq_length=max(max(tokens) for tokens in _TOKENS.values()),
        swiglu=settings.is_gated,
        disable_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    extension = NPTExtension(replace(settings, npt_layers="all"))
    chunks = build_model(
        model,
        ParallelConfig(),
        vocab_size=64,
        seed=1,
        precision="bf16" if bf16 else "fp32",
        extensions=[extension],
    )
    layer: Any = chunks[0].decoder.layers[0]
    layer.mlp.requires_grad_(False)
    layer.pre_mlp_layernorm = torch.nn.Identity()  # the memory of the norm belongs to the base layer
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "base": lambda normed, _: layer.mlp(normed)[0],
        "factored": lambda *inputs: layer.feed_forward.mlp_output(layer, *inputs),
        "materialised": lambda *inputs: materialised_mlp(layer.feed_forward, layer, *inputs),
    }
    found = {name: _bytes_per_token(layer, run, hidden_size, _TOKENS[name]) for name, run in forms.items()}
    base = found["base"]
    factored, materialised = (
        TokenBytes(found[name].kept - base.kept, found[name].peak - base.peak)
        for name in ("factored", "materialised")
    )
    return SizeMemory(hidden_size, ffn_hidden_size, factored, materialised)


def project_memory(measured: Sequence[SizeMemory], hidden_size: int, ffn_hidden_size: int) -> SizeMemory:
    """Projects the memory at other sizes h and f, with the formulas at the top of this file.

    `measured` must contain at least two sizes, whose f / h is about the same.
    """

    def fit(read: Callable[[SizeMemory], float], powers: list[int]) -> float:
        rows = [[float(size.hidden_size) ** power for power in powers] for size in measured]
        matrix = torch.tensor(rows, dtype=torch.float64)
        right = torch.tensor([read(size) for size in measured], dtype=torch.float64).unsqueeze(1)
        constants = torch.linalg.lstsq(matrix, right).solution.flatten().tolist()
        return sum(c * float(hidden_size) ** power for c, power in zip(constants, powers, strict=True))

    ratios = [size.ffn_hidden_size / size.hidden_size for size in measured]
    wider = ffn_hidden_size / hidden_size / (sum(ratios) / len(ratios))
    return SizeMemory(
        hidden_size,
        ffn_hidden_size,
        TokenBytes(fit(lambda m: m.factored.kept, [0, 1]), fit(lambda m: m.factored.peak, [0, 1])),
        TokenBytes(
            wider * fit(lambda m: m.materialised.kept, [2]), wider * fit(lambda m: m.materialised.peak, [2])
        ),
    )


def _bytes_per_token(
    layer: torch.nn.Module, run: Callable[..., torch.Tensor], hidden_size: int, tokens: tuple[int, int]
) -> TokenBytes:
    few, many = (_step_bytes(layer, run, hidden_size, count) for count in tokens)
    kept, peak = ((b - a) / (tokens[1] - tokens[0]) for a, b in zip(few, many, strict=True))
    return TokenBytes(kept, peak)


def _step_bytes(
    layer: torch.nn.Module, run: Callable[..., torch.Tensor], hidden_size: int, tokens: int
) -> tuple[int, int]:
    """Returns the bytes allocated after the forward pass (including its output), and the peak until backward ends."""
    parameter = next(layer.parameters())
    shape = (tokens, 1, hidden_size)
    inputs = [torch.randn(shape).to(parameter).requires_grad_() for _ in range(2)]
    gradient = torch.randn(shape).to(parameter)
    layer.zero_grad(set_to_none=True)
    with AllocationCounter() as counter:
        output = run(*inputs)
        kept = counter.current
        output.backward(gradient)
        return kept, counter.peak
