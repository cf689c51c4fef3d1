#!/usr/bin/env python3
"""Grows a model stack by stack over a frozen or LoRA trunk.

torchrun --nproc-per-node 2 pretrain_progressive.py --config examples/progressive/append_frozen.yaml \
    --data-path corpus_text_document --save racks
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.parse import Found, parse, run_main
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults

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
        description="Grow a model stack by stack (document 004): each stack trains over the trunk of those before it. "
        "A training that is in --save gives the shape and the tokenizer: flags called required below are so for a new "
        "one only.",
        example=EXAMPLE,
        find=_find,
        supplied={"num_layers": "those of the stacks"},
    )
    # Imported late: torch and the engine take seconds, and `--help` or a mistyped flag should answer at once.
    from megatron_ext.progressive.runs.progressive_run import run_progressive

    return run_progressive(config)


def _find(given: Mapping[str, Any]) -> list[Found]:
    """What follows from the stacks; and the shape and tokenizer of a training that is in --save already."""
    found = [stack_defaults(given)]
    if "save" in given and (Path(given["save"]) / "progressive.json").is_file():
        from megatron_ext.progressive.growth.training_history import stored_rack_defaults

        found.append(stored_rack_defaults(Path(given["save"]), given))
    return found


if __name__ == "__main__":
    run_main(main)
