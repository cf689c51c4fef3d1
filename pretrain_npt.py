#!/usr/bin/env python3
"""Trains neuro-plastic transformers: converts a base model's layers, to equivalence, layer by layer, by curriculum.

torchrun --nproc-per-node 2 pretrain_npt.py --load base_checkpoint --mode multi_layer --npt-layers upper_half ...
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.parse import Found, parse, run_main
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.objective.npt_training_config import mode_defaults

EXAMPLE = (
    "torchrun --nproc-per-node 2 pretrain_npt.py --load base_checkpoint --mode multi_layer --npt-layers upper_half "
    "--np-rank 64 --seq-length 256 --micro-batch-size 4 --train-iters 900 --lr 1e-3 --data-path corpus_text_document "
    "--save npt_checkpoints --tensorboard-dir logs"
)


# Document 002's file has NPT's shape under `model`, and losses, optimizer and lengths under `training`.
DOCUMENT_SECTIONS = {"model": ("npt", "np"), "training": ("npt", "optimizer", "model")}

BASE_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    config = parse(
        NPTRunConfig,
        prog="pretrain_npt.py",
        description="Train neuro-plastic transformers (NPT) on top of a base model. Its checkpoint (--load) gives "
        "shape and tokenizer. Defaults of the losses' weights, --np-form and --np-rank follow from --mode; below are "
        "those of equivalence. docs/npt.md has all.",
        example=EXAMPLE,
        find=_find,
        supplied=dict.fromkeys(BASE_SHAPE, "that of --load; required without one"),
        sections=DOCUMENT_SECTIONS,
    )
    # Imported late: torch and the engine take seconds, and `--help` or a mistyped flag should answer at once.
    from megatron_ext.npt.runs.npt_run import run_npt

    return run_npt(config)


def _find(given: Mapping[str, Any]) -> list[Found]:
    """What follows from the mode; what made the NP weights that are loaded; the shape of the model that is loaded."""
    found = [mode_defaults(given)]
    if "load_npt_weights" in given:
        from megatron_ext.npt.runs.npt_run import weights_defaults

        found.append(weights_defaults(given))
    if not given.keys() & {"base_checkpoint", "load", "num_layers"}:
        raise ValueError(
            "--load: missing, the checkpoint of the base model (or --base-checkpoint); a model from scratch needs "
            "--no-freeze-base and a shape, --num-layers and the rest"
        )
    if "base_checkpoint" in given or "load" in given:
        from megatron_ext.npt.runs.npt_run import checkpoint_defaults

        found += checkpoint_defaults(given)
    return found


if __name__ == "__main__":
    run_main(main)
