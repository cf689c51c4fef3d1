#!/usr/bin/env python3
"""Runs lm-evaluation-harness (lm_eval) on a checkpoint, in one process or in several under `torchrun`.

    python tools/run_lm_eval.py --model megatron_ext --model_args load=runs/ckpt,bf16=True --tasks hellaswag
    torchrun --nproc-per-node 2 tools/run_lm_eval.py --model megatron_ext --model_args load=runs/ckpt --tasks hellaswag

All flags are those of `lm_eval run`; `--model_args` takes load, ckpt_step, tensor_model_parallel_size,
pipeline_model_parallel_size, bf16, bos and max_gen_toks. Requires the extra `eval`.
"""

import contextlib
import os
import sys

from megatron_ext.config.command_line.parse import run_main


def main() -> None:
    """Registers the model type `megatron_ext` and runs the harness; only rank 0 prints and writes results."""
    for word in sys.argv[1:]:
        _check_path(word)
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError:
        raise ValueError(
            'run_lm_eval.py requires the package lm_eval; install it with: pip install "megatron-ext[eval]"'
        ) from None
    import megatron_ext.harness.harness_model  # noqa: F401  (registers the model type)
    from megatron_ext.platform import process_groups

    setup_logging()
    cli = HarnessCLI()
    arguments = cli.parse_args()
    several = process_groups.world_size() > 1
    if several and getattr(arguments, "use_cache", None):
        # All processes of one model must compute the same requests, but each process would read a separate cache.
        raise ValueError(
            f"--use_cache {arguments.use_cache}: requires a single process; omit the flag, or start without torchrun"
        )
    with contextlib.ExitStack() as stack:
        if process_groups.rank() > 0:
            for name in ("output_path", "wandb_args", "trackio_args", "hf_hub_log_args"):
                if hasattr(arguments, name):
                    setattr(arguments, name, None)
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        cli.execute(arguments)
    process_groups.shutdown()


def _check_path(word: str) -> None:
    """Checks that the checkpoint after `load=` in this command-line word, if any, exists; lm_eval is slow to import."""
    given = dict(part.partition("=")[::2] for part in word.removeprefix("--model_args=").split(","))
    if "load" in given:
        from megatron_ext.registry.loaded_path import check_holds_checkpoint

        step = given.get("ckpt_step", "")
        check_holds_checkpoint("--model_args load=", given["load"], int(step) if step.isdecimal() else None)


if __name__ == "__main__":
    sys.argv[0] = "run_lm_eval.py"
    run_main(main)
