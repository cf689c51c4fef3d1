#!/usr/bin/env python3
"""Measures the memory of one layer with each attention backend, and of the cross-entropy; prints it as JSON.

python benchmarks/gpu/kernels.py full

kept      bytes that a forward pass keeps for the backward pass, its output included
peak      largest number of bytes in forward and backward, beyond weights and inputs
kernel    torch's attention kernel; "" if attention is not torch's
"""

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.ops.cross_entropy import cross_entropy
from megatron_ext.platform.allocations import AllocationCounter
from megatron_ext.platform.process_groups import device, initialize

_SHAPES = {
    # a layer: hidden size, heads, tokens per sequence, sequences; logits: rows, vocabulary
    "full": ((4096, 32, 4096, 1), (4096, 131072)),
    "tiny": ((64, 4, 64, 2), (64, 1024)),
}
_LAYERS: dict[str, tuple[Literal["sdpa", "local"], torch.dtype, int]] = {
    # backend, precision, heads per key-value head
    "attention sdpa, bf16": ("sdpa", torch.bfloat16, 1),
    "attention sdpa, bf16, grouped queries": ("sdpa", torch.bfloat16, 4),
    "attention sdpa, fp32": ("sdpa", torch.float32, 1),
    "attention sdpa, fp32, grouped queries": ("sdpa", torch.float32, 4),
    "attention local, bf16": ("local", torch.bfloat16, 1),
}
_LOGITS = {"cross-entropy, bf16": torch.bfloat16, "cross-entropy, fp32": torch.float32}


def measure_kernels(size: str, *, profiled: bool) -> dict[str, dict[str, Any]]:
    """Measures every case; the result of a case that fails contains only its `error`.

    Args:
        size: a key of `_SHAPES`.
        profiled: also find the names of torch's kernels.
    """
    initialize(ParallelConfig(), seed=1)
    layer, logits = _SHAPES[size]
    cases: dict[str, Callable[[], Callable[[], Any]]] = {
        **{name: lambda case=case: _layer(*layer, *case) for name, case in _LAYERS.items()},
        **{name: lambda dtype=dtype: _cross_entropy(*logits, dtype) for name, dtype in _LOGITS.items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for name, make in cases.items():
        try:
            found[name] = _measure(make(), profiled)
        except Exception as error:  # a case that fails must not hide the others
            found[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    return found


def _layer(
    hidden: int,
    heads: int,
    length: int,
    rows: int,
    backend: Literal["sdpa", "local"],
    dtype: torch.dtype,
    per_group: int,
) -> Callable[[], Any]:
    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads // per_group,
        seq_length=length,
        swiglu=True,
        disable_bias_linear=True,
        position_embedding_type="rope",
        attention_backend=backend,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    bf16 = dtype is torch.bfloat16
    chunk: Any = build_model(
        model, ParallelConfig(), vocab_size=64, seed=1, precision="bf16" if bf16 else "fp32"
    )[0]
    rotary = chunk.rotary_pos_emb(length)
    inputs = torch.randn(length, rows, hidden, dtype=dtype, device=device(), requires_grad=True)
    return lambda: chunk.decoder.layers[0](inputs, attention_mask=None, rotary_pos_emb=rotary)[0]


def _cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], Any]:
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device(), requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64, device=device())
    return lambda: cross_entropy(logits, labels)


def _measure(forward: Callable[[], Any], profiled: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": _kernel_of(forward) if profiled else ""}
    # Once before: libraries allocate their workspaces, and weights get gradients, which are not the layer's memory.
    output = forward()
    gradient = torch.ones_like(output)
    output.backward(gradient)
    del output
    with AllocationCounter() as counter:
        output = forward()
        found["kept"] = counter.current
        output.backward(gradient)
        found["peak"] = counter.peak
    return found


def _kernel_of(forward: Callable[[], Any]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        forward()
    names = {event.name for event in profiler.events() if "_scaled_dot_product" in event.name}
    return ", ".join(sorted(name.removeprefix("aten::_scaled_dot_product_") for name in names))


if __name__ == "__main__":
    print(f"measured {json.dumps(measure_kernels(sys.argv[1], profiled=True))}")
