"""Finds the checkpoint in a Megatron-LM directory; if none can be read, the error states the reason in one line."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.interop.megatron.inert_pickle import read_torch_file
from megatron_ext.interop.megatron.torch_dist_files import METADATA, TorchDistFiles
from megatron_ext.training.checkpoint.checkpoint_files import CHECKSUMS, TRACKER, checkpoint_name
from megatron_ext.training.checkpoint.incomplete_checkpoints import RELEASE, entries, megatron_problem

COMMON = "common.pt"
BACKEND = "metadata.json"
_COMMON_OBJECT = "common_state/shard_0_1"


def find_megatron_checkpoint(model_dir: str | Path, ckpt_step: int | None = None) -> Path:
    """Returns the directory of one Megatron-LM checkpoint.

    Args:
        model_dir: a directory of checkpoints (with `latest_checkpointed_iteration.txt`), or of one checkpoint.
        ckpt_step: the step; None for the one that the tracker names.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it lacks a file.
        ValueError: it is in another format.
    """
    root = Path(model_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"--model-dir {model_dir}: no such directory")
    names = entries(root)
    folder = root if ckpt_step is None and {METADATA, COMMON} & set(names) else _named(root, ckpt_step)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such directory, although {root / TRACKER} or --ckpt-step names it"
        )
    _check_format(folder)
    return folder


def _named(root: Path, ckpt_step: int | None) -> Path:
    if ckpt_step is not None:
        return root / checkpoint_name(ckpt_step)
    tracker = root / TRACKER
    if not tracker.is_file():
        problem = megatron_problem(root, str(root))
        raise FileNotFoundError(
            f"--model-dir {root}: {problem or f'no {TRACKER} in it; give a directory that Megatron-LM saved to'}"
        )
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return root / RELEASE
    if not text.isdecimal():
        raise ValueError(
            f"{tracker}: the file contains {text[:40]!r} instead of a step number; --ckpt-step selects one"
        )
    return root / checkpoint_name(int(text))


def _check_format(folder: Path) -> None:
    if CHECKSUMS in entries(folder):
        raise ValueError(f"{folder}: is a checkpoint of this package; load it with --load")
    problem = megatron_problem(folder, str(folder))
    if problem is not None:
        raise ValueError(f"{folder}: {problem}")
    if (folder / BACKEND).is_file():
        try:
            backend = json.loads((folder / BACKEND).read_text(encoding="utf-8"))["sharded_backend"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / BACKEND}: the file is damaged") from None
        if backend != "torch_dist":
            raise ValueError(f"{folder}: is in the format {backend}; save it with --ckpt-format torch_dist")


def read_common(files: TorchDistFiles) -> tuple[dict[str, Any], Mapping[str, Any], str]:
    """Returns the part of a checkpoint that is not sharded, the training arguments in it by name, and the path that it
    was read from.

    Raises:
        FileNotFoundError: the checkpoint has no such part.
        ValueError: the part is damaged or has no arguments.
    """
    path = files.folder / COMMON
    if path.is_file():
        common = read_torch_file(path)
    elif _COMMON_OBJECT in files.objects:  # megatron-core 0.19 and later
        path = files.folder
        common = files.read_object(_COMMON_OBJECT)[0]
    else:
        raise FileNotFoundError(f"{path}: the file is missing; copy the whole directory again")
    arguments = common.get("args") if isinstance(common, dict) else None
    if arguments is None:
        raise ValueError(
            f"{path}: has no args, from which the model's shape is read; only pretrain_gpt.py's checkpoints "
            "can be imported"
        )
    return common, arguments if isinstance(arguments, dict) else vars(arguments), str(path)


def make_arguments(values: Mapping[str, Any]) -> Namespace:
    """Returns arguments in the form in which Megatron-LM stores them."""
    return Namespace(**values)
