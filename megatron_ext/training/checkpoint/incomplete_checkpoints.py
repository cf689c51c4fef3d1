"""What a directory holds that is no complete checkpoint of this program: in words, with what to do about it.

A run that is told to load such a directory must not begin from scratch as if nothing were there.
"""

import contextlib
import json
from pathlib import Path

SERIES = ("progressive.json", "training_info.json")
"""Files of a series of trainings (progressive growth, NPT's sequential mode); its checkpoints are in folders below."""

OF_MEGATRON = (
    "a checkpoint of Megatron-LM or another program; convert it to Hugging Face's format there, and that with "
    "tools/convert_checkpoint.py import"
)
"""Says so, and what to do."""

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
    """Names in a directory, none where it is missing.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise ValueError(f"{folder}: a file, not a directory of checkpoints") from None
    except OSError as error:
        raise OSError(f"{folder}: cannot be read: {error.strerror}") from None


def is_hugging_face(folder: Path) -> bool:
    """True for a model in Hugging Face's format, told by config.json or its weights, which is no checkpoint of ours."""
    names = entries(folder)
    if "checksums.json" in names or "latest_checkpointed_iteration.txt" in names:
        return False
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.keys() & {"model_type", "architectures"}:
            return True
    return any(name.endswith(_HF_WEIGHTS) and _NP_WEIGHTS not in name for name in names)


def holds_np_weights(folder: Path) -> bool:
    """True where NPT's factors lie, as in the `final/` of a run."""
    return any(name.startswith(_NP_WEIGHTS) for name in entries(folder))


def foreign(folder: Path) -> str | None:
    """Says what a directory without a complete checkpoint holds instead, None where it is nothing of the kind."""
    names = set(entries(folder))
    if names & _OWN_PARTS:
        return "not a complete checkpoint of this program, checksums.json is missing; copy it again, whole"
    if names & _MEGATRON_PARTS or any(name.startswith(_MEGATRON_PREFIXES) for name in names):
        return OF_MEGATRON
    if any(_NP_WEIGHTS in name for name in names):
        return "NP weights without a model; they are for --load-npt-weights, beside the checkpoint of their base model"
    if is_hugging_face(folder):
        return "a model in Hugging Face's format; tools/convert_checkpoint.py import makes a checkpoint of it"
    return None
