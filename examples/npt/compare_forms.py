#!/usr/bin/env python3
"""Converts a base model to NPT in several ways, trains every conversion, and prints perplexity ratios on held-out
text.

    python examples/npt/compare_forms.py --base-checkpoint runs/base --train-data train_text_document \
        --held-out-data held_out_text_document --output forms.json

Every row of the table is one conversion: layers, residual, form, targets, rank, components, affine. All conversions are
trained for the same number of steps on the same batches. The script runs in one process, and skips conversions whose
results are already in the output file. The table in docs/npt.md was made with this script.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.config.command_line.parse import parse, run_main

if TYPE_CHECKING:
    from megatron_ext.config.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Flags for the conversions to compare, and for the data to train and evaluate them on."""

    base_checkpoint: str
    """Checkpoint of the base model."""

    train_data: str
    """Prefix of the indexed dataset to train on, without .bin and .idx."""

    held_out_data: str
    """Prefix of the indexed dataset to evaluate on, without .bin and .idx."""

    output: str
    """JSON file to write the results to, one row per conversion as it finishes."""

    rows: str
    """Conversions, separated by spaces: layers/residual/form/target/rank[/components[/affine|plain]], such as
    upper_half/keep/low_rank/gate+up/64 or all/drop/outer_product/gate+up+down/64/4/plain.
    """

    steps: int = 200
    """Optimizer steps per conversion."""

    micro_batch_size: int = 8
    """Sequences per step."""

    lr: float = 5e-3
    """Peak learning rate. The schedule has 10 steps of warm-up, then a cosine decay to a tenth of the peak."""

    equivalence_weight: float = 0.0
    """Weight of the layer-wise equivalence loss."""

    direct_mlp_weight: float = 1.0
    """Weight of the direct MLP loss."""

    fidelity_weight: float = 1.0
    """Weight of the divergence between the output distributions of the NPT model and the base model."""

    regularization_weight: float = 0.0
    """Weight of the regularization of the deltas."""

    layer_losses: Literal["local", "document"] = "local"
    """Form of the layers' losses, as in pretrain_npt.py."""

    curriculum_stages: str | None = None
    """Stages of the curriculum. Default: the stage `student` throughout."""

    np_init_scale: float = 0.01
    """Size of the initial deltas, the updates that NPT applies to the weights."""

    seeds: tuple[int, ...] = (1234,)
    """Seeds of the NP components and of the data order; every conversion is run with each of them."""

    max_tokens: int = 100_000
    """Held-out tokens to evaluate on."""


def main() -> int:
    """Runs the conversions that are not in the output file, and prints a table of all conversions."""
    config: ComparisonConfig = parse(
        ComparisonConfig, prog="compare_forms.py", description="Compare forms of NPT."
    )
    from rich.console import Console
    from rich.table import Table

    found: dict[str, Any] = {}
    if Path(config.output).exists():
        found = json.loads(Path(config.output).read_text(encoding="utf-8"))
    for row in config.rows.split():
        for seed in config.seeds:
            key = f"{row}#{seed}#{config.steps}"
            if key not in found:
                found[key] = train_and_evaluate(config, row, seed)
                Path(config.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
                print(key, {k: round(v, 5) for k, v in found[key].items()}, flush=True)
    table = Table(
        title=f"{config.steps} steps, {config.micro_batch_size} sequences each; perplexity NPT / base"
    )
    for column in ("conversion", "seeds", "NP parameters / converted layers'", "untrained", "trained"):
        table.add_column(column)
    for row in config.rows.split():
        values = [found[f"{row}#{seed}#{config.steps}"] for seed in config.seeds]
        ratios = [value["ratio"] for value in values]
        table.add_row(
            row,
            str(len(values)),
            f"{values[0]['parameter_share']:.1%}",
            f"{values[0]['untrained_ratio']:.4g}",
            " ".join(f"{ratio:.4f}" for ratio in ratios),
        )
    Console(width=150).print(table)
    return 0


def module_of(row: str, init_scale: float) -> Any:
    """Returns the NPT configuration of a row, such as upper_half/keep/low_rank/gate+up/64."""
    from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig

    layers, residual, form, target, rank, *more = row.split("/")
    outer = form == "outer_product"
    return NPTModuleConfig(
        npt_layers=layers,
        np_residual=residual,  # type: ignore[arg-type]
        np_form=form,  # type: ignore[arg-type]
        np_target=target,  # type: ignore[arg-type]
        np_rank=int(rank),
        num_np_components=int(more[0]) if more else 1,
        np_affine=not (outer and more[1:] == ["plain"]),
        np_init_scale=init_scale,
    )


def run_config(config: ComparisonConfig, stored: dict[str, Any], seed: int) -> "RunConfig":
    """Returns the configuration of a training run on the base model whose run_config.json contains `stored`."""
    from megatron_ext.config.groups.data_config import DataConfig
    from megatron_ext.config.groups.logging_config import LoggingConfig
    from megatron_ext.config.groups.model_config import ModelConfig
    from megatron_ext.config.groups.optimizer_config import OptimizerSettings
    from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
    from megatron_ext.config.groups.training_config import TrainingConfig
    from megatron_ext.config.run_config import RunConfig
    from megatron_ext.config.serialize import group_in

    return RunConfig(
        model=replace(group_in(ModelConfig, stored, "model"), hidden_dropout=0.0, attention_dropout=0.0),
        training=TrainingConfig(
            micro_batch_size=config.micro_batch_size, train_iters=config.steps, eval_iters=0, seed=seed
        ),
        optimizer=OptimizerSettings(
            lr=config.lr, min_lr=config.lr / 10, lr_decay_style="cosine", lr_warmup_iters=10, weight_decay=0.0
        ),
        data=DataConfig(data_path=(config.train_data,), split="100,0,0", num_workers=0),
        tokenizer=group_in(TokenizerConfig, stored, "tokenizer"),
        logging=LoggingConfig(log_interval=50),
    )


def train_and_evaluate(config: ComparisonConfig, row: str, seed: int) -> dict[str, float]:
    """Runs one row; returns perplexity ratios before and after training, the parameter share and the seconds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_ext.data.tokenizers import build_tokenizer
    from megatron_ext.npt.npt_family import NPTFamily
    from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
    from megatron_ext.platform import process_groups
    from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
    from megatron_ext.training.pretrain import RunOptions, train

    base = BaseCheckpoint.find(config.base_checkpoint)
    run = run_config(config, base.run_config(), seed)
    training = NPTTrainingConfig(
        mode="equivalence",
        equivalence_weight=config.equivalence_weight,
        direct_mlp_weight=config.direct_mlp_weight,
        fidelity_weight=config.fidelity_weight,
        regularization_weight=config.regularization_weight,
        curriculum_stages=config.curriculum_stages,
        layer_losses=config.layer_losses,
    )
    family = NPTFamily(module_of(row, config.np_init_scale), training, total_steps=config.steps)
    converted, length = family.settings.layers(run.model.num_layers), run.model.seq_length
    found: dict[str, float] = {}

    def before(chunks: list[Any]) -> None:
        found["parameter_share"] = parameter_share(chunks, len(converted))
        found["untrained_ratio"] = perplexity_ratio(config, length, chunks, family, found)

    def after(chunks: list[Any], progress: Any) -> None:
        found["ratio"] = perplexity_ratio(config, length, chunks, family, found)

    started = time.perf_counter()
    process_groups.initialize(run.parallel, seed)
    options = RunOptions(base=base, prepare=before, finish=after)
    code = train(run, build_tokenizer(run.tokenizer), [family], options)
    if "ratio" not in found:
        sys.exit(code)  # a signal stopped the run before its last step, so there is no result
    found["seconds"] = time.perf_counter() - started
    return found


def parameter_share(chunks: list[Any], converted: int) -> float:
    """Returns the number of trainable parameters / the number of base parameters in `converted` layers."""
    trainable = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    named = chunks[0].decoder.layers[0].named_parameters()
    return trainable / (converted * sum(p.numel() for name, p in named if "feed_forward" not in name))


def perplexity_ratio(
    config: ComparisonConfig, length: int, chunks: list[Any], family: Any, found: dict[str, float]
) -> float:
    """Returns perplexity of NPT / perplexity of the base on held-out text; stores the base's perplexity in `found`
    for reuse.
    """
    from megatron_ext.inference.perplexity import evaluate_perplexity
    from megatron_ext.npt.modules.npt_layers import deactivated

    def measure() -> float:
        return evaluate_perplexity(
            chunks,
            [family],
            config.held_out_data,
            sequence_length=length,
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
        ).loss

    family.begin_step(chunks, None)
    if "base_perplexity" not in found:
        with deactivated(chunks):
            found["base_perplexity"] = math.exp(measure())
    return math.exp(min(20.0, measure() - math.log(found["base_perplexity"])))


if __name__ == "__main__":
    run_main(main)
