#!/usr/bin/env python3
"""Trains neuro-plastic transformers (NPT) by converting layers of a base model.

torchrun --nproc-per-node 2 pretrain_npt.py --load base_checkpoint --mode multi_layer --npt-layers upper_half ...
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.parse import Found, parse, run_main
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig, mode_defaults
from megatron_ext.rehearsal.rehearse import run_or_rehearse

EXAMPLE = (
    "torchrun --nproc-per-node 2 pretrain_npt.py --load base_checkpoint --mode multi_layer --npt-layers upper_half "
    "--np-rank 64 --seq-length 256 --micro-batch-size 4 --train-iters 900 --lr 1e-3 --data-path corpus_text_document "
    "--save npt_checkpoints --tensorboard-dir logs"
)


# Maps a section of the YAML file to the further config groups whose flags it may contain. In the files of
# docs/design/npt_equivalence.md, `model` also holds NPT's flags, and `training` those of the losses and the
# optimizer.
DOCUMENT_SECTIONS = {"model": ("npt", "np"), "training": ("npt", "optimizer", "model")}

BASE_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    config = parse(
        NPTRunConfig,
        prog="pretrain_npt.py",
        description="Train neuro-plastic transformers (NPT) on top of a base model, whose checkpoint "
        "(--load) provides "
        "the shape and the tokenizer. The defaults of the loss weights, --np-form and --np-rank depend on --mode; "
        "those shown below apply to --mode equivalence. docs/npt.md lists all of them.",
        example=EXAMPLE,
        find=_find,
        supplied=dict.fromkeys(BASE_SHAPE, "from --load; required without it"),
        sections=DOCUMENT_SECTIONS,
    )
    return run_or_rehearse(config, _run)


def _run(config: NPTRunConfig) -> int:
    # Imported late: torch and mcore take seconds to import; `--help` and errors in the flags should appear at once.
    from megatron_ext.npt.runs.npt_run import run_npt

    return run_npt(config)


def _find(given: Mapping[str, Any]) -> list[Found]:
    """Returns defaults from --mode, the loaded NP weights and the base checkpoint; later ones override earlier ones."""
    found = [mode_defaults(given)]
    if "load_npt_weights" in given:
        from megatron_ext.npt.runs.npt_run import weights_defaults

        found.append(weights_defaults(given))
    if not given.keys() & {"base_checkpoint", "load", "num_layers"}:
        raise ValueError(
            "--load is missing: give the checkpoint of the base model (--load or --base-checkpoint); to train from "
            "scratch, give --no-freeze-base and the model's shape (--num-layers, --hidden-size, ...)"
        )
    if given.keys() & {"base_checkpoint", "load", "use_checkpoint_args"}:
        from megatron_ext.npt.runs.npt_run import checkpoint_defaults

        found += checkpoint_defaults(given)
    return found


if __name__ == "__main__":
    run_main(main)
