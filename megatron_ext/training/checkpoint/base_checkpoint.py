"""The checkpoint that holds the frozen base model of a run.

The run's own checkpoints omit the frozen parameters. They name the base checkpoint by its path and by a digest of its
manifest, so that a change of the base checkpoint is detected.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.models.base_parameters import base_tensor_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint.same_run_checks import check_same_model
from megatron_ext.training.interface.family_interface import Family


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A complete checkpoint of a base model."""

    folder: Path
    """Directory of this checkpoint."""

    sha256: str
    """SHA-256 digest of the checkpoint's `checksums.json`."""

    @classmethod
    def find(cls, path: str, ckpt_step: int | None = None) -> "BaseCheckpoint":
        """Returns the checkpoint at `path`, which is its directory or a directory of checkpoints.

        Of several checkpoints, it is the one of step `ckpt_step`, or the newest if `ckpt_step` is None.

        Raises:
            OSError: there is no checkpoint.
            ValueError: the checkpoint is incomplete.
        """
        folder = files.find_checkpoint(path, ckpt_step)
        if folder is None:
            raise FileNotFoundError(
                f"{path}: no checkpoint of a base model found; pass a directory that contains one"
            )
        digest = hashlib.sha256((folder / files.CHECKSUMS).read_bytes()).hexdigest()
        return cls(folder=folder.resolve(), sha256=digest)

    @classmethod
    def of_run(cls, run_config: dict[str, Any]) -> "BaseCheckpoint | None":
        """Returns the base checkpoint that a run's configuration names, or None.

        Raises:
            OSError: the base checkpoint no longer exists.
            ValueError: its directory now contains another checkpoint.
        """
        named = run_config.get("base_checkpoint")
        if named is None:
            return None
        found = cls.find(named["path"])
        if found.sha256 != named["sha256"]:
            raise ValueError(
                f"{found.folder}: is not the base checkpoint with which the run was trained; restore the original"
            )
        return found

    def as_json(self) -> dict[str, str]:
        """Returns the entry that a run's configuration stores for this checkpoint; `of_run` reads it."""
        return {"path": str(self.folder), "sha256": self.sha256}

    def run_config(self) -> dict[str, Any]:
        """Returns the configuration with which the base model was trained."""
        files.verify_checkpoint(self.folder, names=[files.RUN_CONFIG])
        return files.read_json(self.folder / files.RUN_CONFIG)

    @cached_property
    def tensor_names(self) -> set[str]:
        """Names of the tensors that this checkpoint and its own base checkpoint hold. Collective at first use."""
        inner = self.of_run(self.run_config())
        return set(tensors.stored_shapes(self.folder)) | (set() if inner is None else inner.tensor_names)

    def load(self, models: list[GPTModel], run_config: dict[str, Any], families: list[Family]) -> None:
        """Loads all tensors of the base model into models that may have further parameters; collective.

        If the checkpoint itself names a base checkpoint, that base is loaded first.

        Args:
            models: this rank's model chunks, unwrapped.
            run_config: the run's configuration, with the section `families`.
            families: the model families of the run.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another model.
        """
        tensors.verify(self.folder)
        stored = self.run_config()
        inner = self.of_run(stored)
        if inner is not None:
            inner.load(models, run_config, families)
        shared = [family for family in families if family.name in stored["families"]]
        ours = {**run_config, "families": {f.name: run_config["families"][f.name] for f in shared}}
        check_same_model(ours, stored, shared, self.folder, finetune=False)
        base = base_tensor_ids(models)
        tensors.read_into(
            models,
            self.folder,
            wanted=lambda name, value, names: name in names or (inner is None and id(value) in base),
            same_vocabulary=stored["vocab_size"] == ours["vocab_size"],
        )
