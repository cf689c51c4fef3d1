"""Describes directories that are not complete checkpoints of this package, with advice for the user.

A run whose --load names such a directory must not silently start from scratch.
"""

import contextlib
import json
import shlex
from pathlib import Path

SERIES = ("progressive.json", "training_info.json")
"""Files that mark a series of training runs (progressive growth, NPT's sequential mode), whose checkpoints are in
subdirectories.
"""

RELEASE = "release"
"""Name of the directory, and content of the tracker, of a Megatron-LM checkpoint without a step."""

_OWN_PARTS = {"run_config.json", "state.json"}
_MEGATRON_PARTS = {".metadata", "metadata.json", "common.pt", RELEASE}
_LEGACY_PARTS = {"model_optim_rng.pt", "distrib_optim.pt"}
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
    """Returns whether a directory contains a model in Hugging Face's format and is not a checkpoint of this
    package.
    """
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


def import_command(root: Path) -> str:
    """Returns text with the command that imports a Megatron-LM checkpoint."""
    return (
        "import it with `python tools/convert_checkpoint.py import --format megatron --model-dir "
        f"{shlex.quote(str(root))} --save NEW_DIRECTORY`, and load NEW_DIRECTORY"
    )


def megatron_problem(folder: Path, root: str) -> str | None:
    """Returns the reason why a Megatron-LM checkpoint's format cannot be imported, with advice; None if it can.

    Args:
        folder: the checkpoint's directory.
        root: the directory of checkpoints, for the message.
    """
    names = set(entries(folder))
    if names & _LEGACY_PARTS or any(name.startswith("mp_rank_") for name in names):
        return (
            "a checkpoint of Megatron-LM in the format torch, which cannot be imported; convert it with Megatron-LM's "
            f"flags --load {root} --ckpt-convert-format torch_dist --ckpt-convert-save NEW_DIRECTORY, and import the "
            "result"
        )
    if ".metadata" in names and not names & {"common.pt", "metadata.json"}:
        return (
            "a checkpoint of Megatron-LM in the format torch_dcp or fsdp_dtensor, which cannot be imported; load it "
            "with the program that wrote it, save it there with --ckpt-format torch_dist, and import the result"
        )
    return None


def foreign(folder: Path) -> str | None:
    """Describes what a directory without a complete checkpoint contains; None if the contents are not recognized."""
    names = set(entries(folder))
    if names & _OWN_PARTS:
        return "not a complete checkpoint of this package (checksums.json is missing); copy the whole directory again"
    root = folder.parent if folder.name == RELEASE or folder.name.startswith("iter_") else folder
    problem = megatron_problem(folder, str(root))
    if problem is not None:
        return problem
    if names & _MEGATRON_PARTS or any(name.endswith(".distcp") for name in names):
        return f"a checkpoint of Megatron-LM; {import_command(root)}"
    if any(_NP_WEIGHTS in name for name in names):
        return (
            "NP weights without a model; load their base model's checkpoint and pass this path to "
            "--load-npt-weights"
        )
    if is_hugging_face(folder):
        return "a model in Hugging Face's format; convert it with tools/convert_checkpoint.py import"
    return None
