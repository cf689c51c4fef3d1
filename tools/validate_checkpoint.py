#!/usr/bin/env python3
"""Validates an NPT checkpoint: all required files exist, can be read, and match their checksums.

    python tools/validate_checkpoint.py experiments/run/checkpoints/checkpoint-10000

Given a directory of checkpoints, the tool validates the newest complete one. The layout of an NPT checkpoint is
described in docs/design/npt_curriculum.md.
Exit codes: 0 valid, 1 damaged or incomplete, 2 wrong flag or directory.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Flags for the checkpoint to validate."""

    checkpoint: str
    """Directory of one checkpoint, or of several; then the newest complete one is validated. The directory may also be
    given first, without --checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the checkpoint's step, NPT layers, curriculum stage and problems; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--checkpoint")
    config: ValidateConfig = parse(
        ValidateConfig,
        arguments,
        prog="tools/validate_checkpoint.py",
        description="Validate an NPT checkpoint: required files, their content and checksums.",
        example="python tools/validate_checkpoint.py experiments/run/checkpoints/checkpoint-10000",
    )
    from megatron_ext.npt.weights.checkpoint_validation import choose_checkpoint, validate_checkpoint

    if not Path(config.checkpoint).is_dir():
        raise FileNotFoundError(f"--checkpoint {config.checkpoint}: no such directory")
    folder, unfinished = choose_checkpoint(Path(config.checkpoint))
    found = validate_checkpoint(folder)
    for line in found.facts:
        print(line)
    for line in unfinished + found.problems:
        print(f"problem: {line}")
    print(f"{folder}: {'damaged or incomplete' if found.problems else 'valid'}")
    return 1 if unfinished + found.problems else 0


if __name__ == "__main__":
    run_main(main)
