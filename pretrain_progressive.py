#!/usr/bin/env python3
"""Trains a model that grows by stacks of layers; the earlier layers (the trunk) are frozen or have LoRA adapters.

    torchrun --nproc-per-node 2 pretrain_progressive.py --config examples/progressive/append_frozen.yaml \
        --data-path corpus_text_document --save racks
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.parse import Found, parse, run_main
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults
from megatron_ext.rehearsal.rehearse import run_or_rehearse

EXAMPLE = (
    "torchrun --nproc-per-node 2 pretrain_progressive.py --target-stacks 3 --n-blocks 4 --stack-steps 200 "
    "--hidden-size 512 --num-attention-heads 8 --seq-length 256 --training-objective clm --lr 1e-3 "
    "--data-path corpus_text_document --save racks --tensorboard-dir logs"
)


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    config = parse(
        ProgressiveRunConfig,
        prog="pretrain_progressive.py",
        description="Grow a model stack by stack: each stack (a group of layers) trains on top of the earlier ones, "
        "the trunk. If --save contains a training run, that run provides the model's shape and the tokenizer; the "
        "flags marked as required below are then optional.",
        example=EXAMPLE,
        find=_find,
        supplied={"num_layers": "sum over the stacks"},
    )
    return run_or_rehearse(config, _run)


def _run(config: ProgressiveRunConfig) -> int:
    # Imported late: torch and mcore take seconds to import; `--help` and errors in the flags should appear at once.
    from megatron_ext.progressive.runs.progressive_run import run_progressive

    return run_progressive(config)


def _find(given: Mapping[str, Any]) -> list[Found]:
    """Returns the defaults that follow from the stacks; an existing training run in --save overrides them."""
    found = [stack_defaults(given)]
    if "save" in given and (Path(given["save"]) / "progressive.json").is_file():
        from megatron_ext.progressive.growth.training_history import stored_rack_defaults

        found += stored_rack_defaults(Path(given["save"]), given)
    elif "use_checkpoint_args" in given:
        from megatron_ext.training.checkpoint.run_directory import check_checkpoint_args

        check_checkpoint_args(given, "save")
    return found


if __name__ == "__main__":
    run_main(main)
