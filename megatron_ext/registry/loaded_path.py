"""Checks the path from which a tool loads a model; the error names the flag and the path's actual content."""

from pathlib import Path

from megatron_ext.npt.calibration.calibrated_start import FOLDER
from megatron_ext.npt.weights.np_weight_files import STEM
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint


def check_holds_checkpoint(flag: str, path: str, ckpt_step: int | None = None) -> None:
    """Checks that a path holds a checkpoint.

    Args:
        flag: the command-line flag that gave the path, for error messages.
        path: a directory of checkpoints, or the directory of one checkpoint.
        ckpt_step: the step to load; None for the newest.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError, OSError: see `find_checkpoint`.
    """
    if find_checkpoint(path, ckpt_step) is not None:
        return
    named = f"{flag}{path}" if flag.endswith("=") else f"{flag} {path}"
    if not Path(path).exists():
        raise FileNotFoundError(f"{named}: no such directory")
    weights = Path(path, FOLDER, f"{STEM}.safetensors")
    remedy = ""
    if weights.is_file():
        remedy = (
            "; it contains only calibrated NP weights, not a whole model: evaluate them with "
            f"tools/evaluate_npt.py --checkpoint BASE --npt-weights {weights}, or repeat the "
            "calibration's command with --train-iters above 0 to train from them and save checkpoints"
        )
    raise FileNotFoundError(f"{named}: no checkpoint found{remedy}")
