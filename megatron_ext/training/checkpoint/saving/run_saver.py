"""Writes the checkpoints of one run, and removes old ones according to --keep-last and --overwrite-checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.collectives import gather_or_raise, is_first_rank, on_every_rank, on_first_rank
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint import random_state
from megatron_ext.training.checkpoint.optimizer_state import OptimizerState
from megatron_ext.training.checkpoint.saving.running_save import Parts
from megatron_ext.training.checkpoint.saving.tensor_writer import Digests, HostCopies, TensorWriter
from megatron_ext.training.engine.data_parallel import gather_parameters, unwrap_models
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.interface.own_optimizer import bring_up_to_date

StateOf = Callable[[int | None], dict[str, Any]]
"""A function that returns the content of state.json, given the optimizer's number of updates (None if the optimizer
is not saved).
"""


class RunSaver:
    """Writes one run's checkpoints."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        run_config: dict[str, Any],
        families: list[Family],
        keeps: Callable[[], tensors.Keeps | None],
        message: Callable[[str], None],
    ) -> None:
        """Args:
        config, chunks, optimizer, run_config, families, message: as for `Checkpointer`.
        keeps: returns a function that selects the model's tensors to save; None for all.
        """
        self._config, self._families = config, families
        self._chunks, self._optimizer = chunks, optimizer
        self._models: list[GPTModel] = unwrap_models(chunks)
        self._run_config, self._keeps, self._message = run_config, keeps, message
        self._has_saved = False
        self.goes_on_from: int | None = None
        """The step from which the run resumed, if its checkpoint is in --save; otherwise None."""

    def parts(self, path: Path, step: int, state: StateOf, copies: HostCopies | None) -> Parts:
        """Yields the parts of a save; with `copies`, parts may run while training changes the model.

        Args:
            path: the checkpoint's directory.
            step: number of completed steps.
            state: returns the content of state.json; see `StateOf`.
            copies: memory for copies of the tensors; None to write the tensors directly.

        Raises:
            OSError: the checkpoint could not be written; raised on every rank. Earlier checkpoints are intact.
        """
        root, name = path.parent, path.name
        try:
            yield from self._writing(path, state, copies)
        except GeneratorExit:
            raise  # the save is cancelled; other ranks may still write, so remove nothing
        except BaseException as error:
            if is_first_rank():
                files.discard(root, name)
            if isinstance(error, OSError):
                dist.barrier()  # no rank may end the run while rank 0 is still removing files
                left = "its files were removed"
                if path.is_dir():
                    left = f"it is complete, but {files.TRACKER} does not name it; load it with --ckpt-step {step}"
                raise OSError(
                    f"--save {root}: the checkpoint of step {step} could not be written ({error}); {left}; earlier "
                    "checkpoints are intact"
                ) from error
            raise
        line, *_ = yield lambda: self._remove_older(root, name) if is_first_rank() else None
        if line is not None:
            self._message(line)

    def _writing(self, path: Path, state: StateOf, copies: HostCopies | None) -> Parts:
        """Yields the parts of writing and publishing a checkpoint."""
        gather_parameters(self._chunks)
        bring_up_to_date(self._optimizer)
        folder = on_first_rank(lambda: files.begin(path.parent, path.name))
        writer = self._prepare(folder, state, copies)

        def publish(written: list[Digests]) -> None:
            digests = {name: digest for part in written for name, digest in part.items()}
            files.write_checksums(folder, {**digests, **writer.write_metadata()})
            files.publish(path.parent, path.name)

        try:
            written = yield lambda: {**writer.write(), **files.digests(folder, _small_files(folder))}
            writer.gather()
            yield lambda: publish(written) if is_first_rank() else None
        finally:
            writer.cancelled.set()  # if the save is cancelled, this ends `write` in its thread

    def _prepare(self, folder: Path, state_of: StateOf, copies: HostCopies | None) -> TensorWriter:
        """Writes everything except this rank's tensors, and prepares to write these tensors. Collective."""
        state = tensors.model_state(self._models, self._keeps())
        step = None
        if not self._config.no_save_optim:
            optimizer = OptimizerState(self._optimizer, state)
            step = max(gather_or_raise(optimizer.step))
            held = optimizer.sharded(is_loading=False)
            # A rank without optimizer state gets no entry, because megatron-core does not accept an empty one.
            state |= {"optimizer": held} if held else {}
        writer = TensorWriter(state, folder, copies)
        told = state_of(step)

        def write_rest() -> None:
            if not self._config.no_save_rng:
                random_state.save(folder / random_state.file_name(dist.get_rank()))
            if is_first_rank():
                files.write_text(folder / files.RUN_CONFIG, json.dumps(self._run_config, indent=1))
                files.write_text(folder / files.STATE, json.dumps(told, indent=1))

        on_every_rank(write_rest)
        for family in self._families:
            family.write_files(self._models, folder, {**told, "run_config": self._run_config})
        return writer

    def _remove_older(self, root: Path, name: str) -> str | None:
        """Removes old checkpoints after a save, as --keep-last and --overwrite-checkpoints require.

        Returns:
            A line for the user: the checkpoints that --keep-last has removed, or the reason why one could not be
            removed (the run continues). None if there was nothing to remove.
        """
        keep, iteration = self._config.keep_last, files.step_of(name) or 0
        overwrites = self._config.overwrite_checkpoints and not self._has_saved
        self._has_saved = True
        try:
            if overwrites:
                files.remove_overwritten(root, name, self.goes_on_from)
            if keep is not None:
                removed = files.prune(root, keep, iteration)
                return f"--keep-last {keep}: removed {', '.join(removed)}" if removed else None
        except OSError as error:
            flag = f"--keep-last {keep}" if keep is not None else "--overwrite-checkpoints"
            return f"{flag}: an old checkpoint could not be removed: {error}"
        return None


def _small_files(folder: Path) -> list[str]:
    """Returns the relative paths of the files that this rank has written, except for its tensors.

    On rank 0 they include the files shared by all ranks.
    """
    own = random_state.file_name(dist.get_rank())
    names = [own] if (folder / own).is_file() else []
    if is_first_rank():
        names += [p.name for p in folder.iterdir() if p.is_file() and not p.name.endswith(".distcp")]
    return names
