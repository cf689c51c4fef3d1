#!/usr/bin/env python3
"""Checks in seconds that per-layer embedding works on this machine with the given flags and parallel layout.

The tool trains a tiny model on data in which every second token is determined by the token before it, prints statistics
of each layer, and fails if the per-layer parameters of a layer get no gradient or the loss does not fall.
Exit codes: 0 passed, 1 failed, 2 wrong flag.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.cross_checks import validate
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig

VOCAB_SIZE = 64
STEPS = 20
TINY = ["--per-layer-vocab-size", str(VOCAB_SIZE), "--per-layer-hidden-size", "16"]
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    swiglu=True,
    disable_bias_linear=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
SHOWN = ("embedding-norm", "embedding-gradient-norm", "gradient-norm", "gate-activation-mean", "update-ratio")


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Flags of this tool."""

    per_layer: PerLayerConfig
    parallel: ParallelConfig


def main() -> int:
    """Trains the tiny model, prints the statistics and returns the exit code."""
    flags = parse(
        DemoFlags,
        ["--use-per-layer-embedding", *TINY, *sys.argv[1:]],
        prog="tools/per_layer_demo.py",
        description=str(__doc__),
        example="torchrun --nproc-per-node 2 tools/per_layer_demo.py --tensor-model-parallel-size 2 "
        "--per-layer-combination-method gated",
    )
    parallel = flags.parallel
    settings = replace(
        flags.per_layer, log_per_layer_stats=True, log_per_layer_gradients=True, per_layer_stats_interval=1
    )
    settings.check_layout(parallel.tensor_model_parallel_size)
    validate(MODEL, parallel)
    from megatron_ext.platform import process_groups

    losses, statistics = train(settings, parallel)
    is_first = process_groups.rank() == 0
    process_groups.shutdown()
    return report(settings, losses, statistics) if is_first else 0


def train(settings: PerLayerConfig, parallel: ParallelConfig) -> tuple[list[float], dict[str, float]]:
    """Trains the tiny model; returns the loss of every step, and the last step's statistics."""
    import torch

    from megatron_ext.models.build_model import build_model
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily
    from megatron_ext.platform import process_groups
    from megatron_ext.training.engine.data_parallel import wrap_model
    from megatron_ext.training.engine.lr_schedule import build_scheduler
    from megatron_ext.training.engine.optimizer import build_optimizer
    from megatron_ext.training.engine.training_step import Stepper

    process_groups.initialize(parallel, seed=1)
    family = PerLayerFamily(settings, VOCAB_SIZE, torch.arange(VOCAB_SIZE) % settings.rows(VOCAB_SIZE))
    extension = family.extension()
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[extension])
    family.prepare_model(chunks)
    wrapped = wrap_model(chunks, parallel)
    optimization = OptimizerSettings(lr=1e-2, lr_decay_style="constant")
    optimizer = build_optimizer(optimization, parallel, wrapped, [family])
    batch = 4 * parallel.data_parallel_size(process_groups.world_size())
    scheduler = build_scheduler(optimization, TrainingConfig(train_iters=STEPS), optimizer, batch)
    stepper = Stepper(
        wrapped, [family], optimizer, scheduler, global_batch_size=batch, micro_batch_size=1, clip_grad=1.0
    )
    batches = rule()
    results = [stepper.train(batches, step) for step in range(1, STEPS + 1)]
    return [result.loss for result in results], results[-1].statistics


def rule() -> Iterator[dict[str, Any]]:
    """Yields micro-batches of one sequence without end; in each sequence, token 2i determines token 2i + 1."""
    import torch

    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(MODEL.seq_length).unsqueeze(0)
    while True:
        tokens = torch.randint(0, VOCAB_SIZE, (1, MODEL.seq_length + 1), generator=generator)
        tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % VOCAB_SIZE
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(1, MODEL.seq_length),
            "position_ids": positions,
        }


def report(settings: PerLayerConfig, losses: list[float], statistics: dict[str, float]) -> int:
    """Prints the statistics and the verdict; returns the exit code."""
    print("layer  " + "  ".join(SHOWN))
    gradients = []
    for layer in range(MODEL.num_layers):
        values = [statistics[f"per-layer/{name}/layer_{layer:02d}"] for name in SHOWN]
        print(f"{layer:>5}  " + "  ".join(f"{v:>{len(n)}.4g}" for n, v in zip(SHOWN, values, strict=True)))
        gradients += values[2:3] if settings.freeze_per_layer_embedding else values[1:3]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {STEPS} steps")
    faults = []
    if not all(gradient > 0 for gradient in gradients):
        faults.append("a layer's per-layer parameters get no gradient")
    if not losses[-1] < losses[0]:
        faults.append("the loss does not fall")
    print("per-layer embedding works" if not faults else "FAILED: " + "; ".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
