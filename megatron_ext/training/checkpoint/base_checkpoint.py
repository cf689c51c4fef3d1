"""The checkpoint of a base model under a run that trains something on top of it.

The run's own checkpoints then leave out what is frozen. They name the base by its place and by a digest of its
manifest, so that it is found again, and no other taken for it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.models.base_parameters import base_parameter_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint.same_run_checks import check_same_model
from megatron_ext.training.interface.family_interface import Family


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A complete checkpoint."""

    folder: Path
    """Its own directory."""

    sha256: str
    """Digest of its manifest of checksums."""

    @classmethod
    def find(cls, path: str, ckpt_step: int | None = None) -> "BaseCheckpoint":
        """The checkpoint at `path`, a directory of checkpoints or one checkpoint's own.

        Raises:
            OSError: there is none.
            ValueError: it is not complete.
        """
        folder = files.find_checkpoint(path, ckpt_step)
        if folder is None:
            raise FileNotFoundError(f"{path}: no checkpoint of a base model there")
        digest = hashlib.sha256((folder / files.CHECKSUMS).read_bytes()).hexdigest()
        return cls(folder=folder.resolve(), sha256=digest)

    @classmethod
    def of_run(cls, run_config: dict[str, Any]) -> "BaseCheckpoint | None":
        """The base that a run's configuration names, None where it stands alone.

        Raises:
            OSError: it is not there any more.
            ValueError: another checkpoint is there.
        """
        named = run_config.get("base_checkpoint")
        if named is None:
            return None
        found = cls.find(named["path"])
        if found.sha256 != named["sha256"]:
            raise ValueError(f"{found.folder}: is not the base checkpoint that the run was made with")
        return found

    def as_json(self) -> dict[str, str]:
        """For a run's configuration; `of_run` reads it."""
        return {"path": str(self.folder), "sha256": self.sha256}

    def run_config(self) -> dict[str, Any]:
        """The configuration with which it was made."""
        files.verify_checkpoint(self.folder, names=[files.RUN_CONFIG])
        return files.read_json(self.folder / files.RUN_CONFIG)

    def load(self, models: list[GPTModel], run_config: dict[str, Any], families: list[Family]) -> None:
        """Loads all that it has into models that may have more; collective.

        Args:
            models: this rank's chunks, unwrapped.
            run_config: the run's, with the section `families`.
            families: the run's.

        Raises:
            ValueError: it is damaged, or of another model.
        """
        tensors.verify(self.folder)
        stored = self.run_config()
        shared = [family for family in families if family.name in stored["families"]]
        ours = {**run_config, "families": {f.name: run_config["families"][f.name] for f in shared}}
        check_same_model(ours, stored, shared, self.folder, finetune=False)
        base = base_parameter_ids(models)
        tensors.read_into(
            models,
            self.folder,
            wanted=lambda name, value, names: name in names or id(value) in base,
            same_vocabulary=stored["vocab_size"] == ours["vocab_size"],
        )
