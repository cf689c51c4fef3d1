"""Describes directories that are not complete checkpoints of this program, and says what the user can do about them.

A run whose --load names such a directory must not silently start from scratch.
"""

import contextlib
import json
from pathlib import Path

SERIES = ("progressive.json", "training_info.json")
"""Files that mark a series of training runs (progressive growth, NPT's sequential mode), whose checkpoints are in
subdirectories.
"""

OF_MEGATRON = (
    "a checkpoint of Megatron-LM or another program; convert it to Hugging Face's format with that program, and import "
    "the result with tools/convert_checkpoint.py import"
)
"""Message for a checkpoint of another program."""

_OWN_PARTS = {"run_config.json", "state.json"}
_MEGATRON_PARTS = {
    ".metadata",
    "metadata.json",
    "common.pt",
    "model_optim_rng.pt",
    "distrib_optim.pt",
    "release",
}
_MEGATRON_PREFIXES = ("mp_rank_", "__0_0.")
_NP_WEIGHTS = "npt_weights."
_HF_WEIGHTS = (".safetensors", ".safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def entries(folder: Path) -> list[str]:
    """Returns the sorted names of the files in a directory; the list is empty if the directory does not exist.

    Raises:
        ValueError: `folder` is a file.
        OSError: the directory cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise ValueError(f"{folder}: this is a file, not a directory of checkpoints") from None
    except OSError as error:
        raise OSError(f"{folder}: cannot be read: {error.strerror}") from None


def is_hugging_face(folder: Path) -> bool:
    """Returns whether a directory contains a model in Hugging Face's format and is not a checkpoint of this program."""
    names = entries(folder)
    if "checksums.json" in names or "latest_checkpointed_iteration.txt" in names:
        return False
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.keys() & {"model_type", "architectures"}:
            return True
    return any(name.endswith(_HF_WEIGHTS) and _NP_WEIGHTS not in name for name in names)


def holds_np_weights(folder: Path) -> bool:
    """Returns whether a directory contains NP weight files, as a run's `final/` does."""
    return any(name.startswith(_NP_WEIGHTS) for name in entries(folder))


def foreign(folder: Path) -> str | None:
    """Describes what a directory without a complete checkpoint contains; None if the contents are not recognized."""
    names = set(entries(folder))
    if names & _OWN_PARTS:
        return "not a complete checkpoint of this program (checksums.json is missing); copy the whole directory again"
    if names & _MEGATRON_PARTS or any(name.startswith(_MEGATRON_PREFIXES) for name in names):
        return OF_MEGATRON
    if any(_NP_WEIGHTS in name for name in names):
        return "NP weights without a model; load their base model's checkpoint and pass this path to --load-npt-weights"
    if is_hugging_face(folder):
        return "a model in Hugging Face's format; convert it with tools/convert_checkpoint.py import"
    return None
