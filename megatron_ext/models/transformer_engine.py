"""Decides whether a run uses Transformer Engine; if not, states the reason in one line.

`--transformer-impl auto` uses Transformer Engine if it is available; flags that name Transformer Engine require it.
If it is not available (not installed, an unsupported version, not importable, or no GPU), it is hidden from
megatron-core as well.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform.engine_imports import transformer_engine_problem
from megatron_ext.platform.process_groups import use_cuda

_ON_A_CPU = {
    "--attention-backend te": "--attention-backend sdpa",
    "--transformer-impl transformer_engine": "--transformer-impl local",
    "--distributed-backend nccl": "--distributed-backend gloo",
}
"""Maps a flag that requires a GPU to the flag to give instead on a CPU."""


def uses_te(model: ModelConfig) -> bool:
    """Returns whether linear layers and norms are Transformer Engine's."""
    if model.transformer_impl == "auto":
        return transformer_engine_problem() is None
    return model.transformer_impl == "transformer_engine"


def check_te(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises `ValueError` if a flag requires Transformer Engine or FP8, which is not available.

    Without a GPU, the error names every flag that requires one, including NCCL's, and the flags to give instead.
    """
    flags = [*model.requires_te]
    # When the engine recomputes a norm, it reads Transformer Engine's FP8 state even if FP8 is off.
    if parallel.recompute_granularity == "selective" and "layernorm" in parallel.recompute_modules:
        flags.append("--recompute-modules layernorm")
    if parallel.gradient_accumulation_fusion:
        flags.append("--gradient-accumulation-fusion")
        if model.transformer_impl == "local":
            raise ValueError(
                f"{flags[-1]}: requires --transformer-impl auto or transformer_engine (got local)"
            )
    if parallel.cross_entropy_fusion_impl == "te":
        flags.append("--cross-entropy-fusion-impl te")
    problem = transformer_engine_problem() if flags else None
    if parallel.distributed_backend == "nccl" and not use_cuda():
        flags.append("--distributed-backend nccl")
        problem = "a CUDA device is required, and none was found"
    if problem is not None:
        raise ValueError(f"{', '.join(flags)}: {problem}{_advice(flags)}")
    problem = _fp8_problem(model.fp8_recipe) if model.fp8_format is not None else None
    if problem is not None:
        raise ValueError(f"--fp8-format {model.fp8_format}: {problem}")


def _advice(flags: list[str]) -> str:
    """Returns the end of an error message: the flags to give instead on a machine without a GPU; "" with a GPU."""
    instead = [_ON_A_CPU[one] for one in flags if one in _ON_A_CPU]
    return f"; on a CPU use {' '.join(instead)}" if instead and not use_cuda() else ""


def _fp8_problem(recipe: str) -> str | None:
    """Returns Transformer Engine's reason why this GPU cannot compute with an FP8 recipe; None if it can."""
    from transformer_engine.pytorch import fp8

    checks = {
        "mxfp8": fp8.check_mxfp8_support,
        "blockwise": fp8.check_fp8_block_scaling_support,
    }
    supported, reason = checks.get(recipe, fp8.check_fp8_support)()
    return None if supported else reason


def fuse_gradient_accumulation(chunk: torch.nn.Module) -> None:
    """Lets Transformer Engine's linear layers, instead of autograd, add their weight gradients to `main_grad`."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    # The engine's own switch would also affect the output layer, which would then require Apex.
    for module in chunk.modules():
        if isinstance(module, TransformerEngineBaseModule):
            module.fuse_wgrad_accumulation = True


def note_without_te(model: ModelConfig) -> str | None:
    """Returns a message if `--transformer-impl auto` does not use Transformer Engine although there is a GPU;
    otherwise None.
    """
    if model.transformer_impl != "auto" or not use_cuda() or transformer_engine_problem() is None:
        return None
    return f"linear layers: megatron-core's ({transformer_engine_problem()})"


def on_this_machine(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's `model` section, without Transformer Engine if it cannot be used on this machine.

    The implementations used instead have the same weights and compute the same function, except for FP8's rounding.
    """
    if transformer_engine_problem() is None:
        return dict(section)
    others: dict[str, dict[Any, Any]] = {
        "transformer_impl": {"transformer_engine": "auto"},
        "attention_backend": {"te": "sdpa"},
        "fp8_format": dict.fromkeys(("e4m3", "hybrid")),
    }
    found = {
        name: others[name].get(value, value) if name in others else value for name, value in section.items()
    }
    if found.get("fp8_format") is None:  # the other FP8 fields would be refused without it
        found = {name: value for name, value in found.items() if not name.startswith("fp8_")}
    return found
