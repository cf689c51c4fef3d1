"""Saves and loads runs: model, optimizer, schedule, random state, progress, model families' state, configuration.

With the same parallel layout a resumed run continues bit for bit. If the tensor-, pipeline- or data-parallel size has
changed, model, optimizer and schedule are restored as well, but the random generators are re-seeded. The files are
described in `checkpoint_files`, the guarantees in docs/checkpoints.md.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.collectives import on_every_rank, on_first_rank, print_on_first_rank
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors as tensors
from megatron_ext.training.checkpoint import random_state, scheduler_state
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.optimizer_state import OptimizerState
from megatron_ext.training.checkpoint.run_directory import checkpoint_to_load, later_steps, step_to_go_on_from
from megatron_ext.training.checkpoint.same_run_checks import check_same_model
from megatron_ext.training.checkpoint.saving.run_saver import RunSaver
from megatron_ext.training.checkpoint.saving.running_save import Parts, RunningSave, run_parts
from megatron_ext.training.checkpoint.saving.tensor_writer import HostCopies
from megatron_ext.training.engine.data_parallel import unwrap_models
from megatron_ext.training.engine.loss_scale import loss_scale_state, restore_loss_scale
from megatron_ext.training.interface.family_interface import Family

IMPORTED = "hugging_face"
"""Section of `run_config` about an imported Hugging Face model: its configuration and small files, but not its tensors.
Runs copy the section, so that a later export can restore them.
"""


@dataclass(kw_only=True)
class TrainingProgress:
    """The progress of a run."""

    iteration: int = 0
    """Steps done, including skipped ones."""

    consumed_samples: int = 0
    """Sequences consumed from the training set."""

    skipped_steps: int = 0
    """Steps that were skipped because the loss or gradient was not finite."""


class Checkpointer:
    """Saves and loads the checkpoints of one run."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        run_config: dict[str, Any],
        families: list[Family],
        base: BaseCheckpoint | None = None,
        name: Callable[[int], str] = files.checkpoint_name,
        loads_what_fits: bool = False,
        message: Callable[[str], None] = print_on_first_rank,
    ) -> None:
        """Args:
        config: the checkpoint flags: directories, number of checkpoints to keep, and parts to save and load.
        chunks: this rank's model chunks, wrapped or unwrapped.
        optimizer: the optimizer of `chunks`.
        scheduler: the schedule of `optimizer`.
        run_config: the configuration as JSON values: a section for each config group, and the entries `vocab_size`
            and `tokenizer_fingerprint`. The sections of the model families are added here.
        families: the run's model families, whose configuration, state and files are saved.
        base: the checkpoint from which the base model was loaded. If it is given, the run's checkpoints omit the base
            checkpoint's frozen parameters.
        name: returns the name of the checkpoint's directory for a step; `checkpoint_files.step_of` must be able to
            parse it.
        loads_what_fits: whether to load only the tensors that exist in both checkpoint and run, and to start with a new
            optimizer state.
        message: prints a line for the user; called on every rank.
        """
        self.config = config
        self.models: list[GPTModel] = unwrap_models(chunks)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.families = families
        self.run_config = {
            **run_config,
            "families": {f.name: f.configuration() for f in families},
            "base_checkpoint": base.as_json() if base is not None else None,
        }
        self.base = base
        self.name = name
        self.loads_what_fits = loads_what_fits
        self.message = message
        self._saver = RunSaver(
            config,
            chunks=chunks,
            optimizer=optimizer,
            run_config=self.run_config,
            families=families,
            keeps=self._keeps,
            message=message,
        )
        self._copies = HostCopies()
        self._running: RunningSave | None = None
        if base is not None:
            self._keep_import(base.run_config())

    def save(self, progress: TrainingProgress) -> Path:
        """Saves the run; collective.

        With `--overwrite-checkpoints` the first save removes the checkpoints of the run that is overwritten.

        Args:
            progress: the run's progress, which is stored and gives the directory its name.

        Returns:
            The checkpoint's directory.

        Raises:
            OSError: the checkpoint could not be written; raised on every rank. Earlier checkpoints are intact.
        """
        assert self._running is None, "a save is still running"
        run_parts(self._saving(progress, copies=None))
        return self.path(progress)

    def _saving(self, progress: TrainingProgress, *, copies: HostCopies | None) -> Parts:
        return self._saver.parts(
            self.path(progress), progress.iteration, functools.partial(self._state, progress), copies
        )

    def begin_save(self, progress: TrainingProgress) -> None:
        """Like `save`, but copies the tensors and writes the copies while training continues. Collective.

        Call `proceed_with_save` between steps, and `give_up_save` if training fails.
        """
        assert self._running is None, "a save is still running"
        self._running = RunningSave(self._saving(progress, copies=self._copies))

    def proceed_with_save(self, *, wait: bool) -> bool:
        """Advances a save that `begin_save` has started. Collective.

        Args:
            wait: whether to wait for the end of the save.

        Returns:
            Whether the checkpoint has been completed in this call; False if no save is running.

        Raises:
            OSError: as in `save`.
        """
        if self._running is None:
            return False
        try:
            complete = self._running.proceed(wait=wait)
        except Exception:
            self._running = None  # the failed save has already removed its files
            raise
        if complete:
            self._running = None
        return complete

    def give_up_save(self) -> None:
        """Cancels a running save on this rank, because training has failed; leaves the same files as a killed
        process. Not collective.
        """
        if self._running is not None:
            self._running.give_up()
            self._running = None

    def path(self, progress: TrainingProgress) -> Path:
        """Returns the directory of a step's checkpoint."""
        assert self.config.save is not None, "saving needs --save"
        return Path(self.config.save) / self.name(progress.iteration)

    def load(self) -> TrainingProgress | None:
        """Loads the checkpoint that the configuration names; collective.

        Returns:
            The run's progress (step 0 with `--finetune`), or None if there is nothing to load.

        Raises:
            ValueError: the checkpoint is damaged, belongs to another model, or lacks a part that must be loaded.
            OSError: the checkpoint cannot be read, or the step of `--ckpt-step` does not exist.
        """
        if self.config.load is None:
            return None
        root = self.config.load
        folder = on_first_rank(lambda: checkpoint_to_load(self.config))
        if folder is None:
            self.message(f"--load {root}: no checkpoint found; the run starts from scratch")
            return None
        stored, state = _read_verified(folder)
        self._check_base(stored, folder)
        check_same_model(self.run_config, stored, self.families, folder, finetune=self.config.finetune)
        self._keep_import(stored)
        same_vocabulary = stored["vocab_size"] == self.run_config["vocab_size"]
        self._load_tensors(folder, state, same_vocabulary)
        if self.config.finetune:
            self.message(f"loaded the model of {folder}; the run starts at step 0")
            return TrainingProgress()
        scheduler_state.restore_scheduler(
            self.scheduler, state["scheduler"], folder, run=self.run_config, stored=stored
        )
        for family in self.families:
            family.load_state_dict(state["families"][family.name])
        progress = TrainingProgress(**state["progress"])
        self._load_random_state(folder, state, progress)
        self._saver.goes_on_from = step_to_go_on_from(self.config, folder)
        self.message(f"loaded {folder}; the run continues after step {progress.iteration}")
        later = on_first_rank(lambda: later_steps(self.config, self._saver.goes_on_from))
        if later and not self.config.overwrite_checkpoints:
            self.message(f"warning: --save also contains later {later}; the run will overwrite them")
        return progress

    def _keep_import(self, stored: dict[str, Any]) -> None:
        """Copies the section `IMPORTED` of a stored configuration, unless this run's tokenizer differs.

        The section refers to ids of the imported model's tokenizer.
        """
        if IMPORTED not in stored:
            return
        if stored["tokenizer_fingerprint"] == self.run_config["tokenizer_fingerprint"]:
            self.run_config[IMPORTED] = stored[IMPORTED]
        else:
            self.message(
                "the tokenizer differs from the imported model's; an export will omit the imported "
                "model's generation "
                "configuration and additional files"
            )

    def _keeps(self) -> tensors.Keeps | None:
        """Returns a function that selects the model's tensors to save in the run's checkpoints; None for all.

        With a base checkpoint these are the trained tensors and all tensors that the base checkpoint lacks.
        """
        if self.base is None:
            return None
        of_base = self.base.tensor_names
        return lambda name, value: name not in of_base or value.requires_grad

    def _wanted(self) -> tensors.Wanted | None:
        """Returns a function that selects the model's tensors to load; None for all."""
        keeps, fits = self._keeps(), self.loads_what_fits
        if keeps is None and not fits:
            return None
        return lambda name, value, stored: (
            (keeps is None or keeps(name, value)) and (not fits or name in stored)
        )

    def _check_base(self, stored: dict[str, Any], folder: Path) -> None:
        theirs, ours = stored.get("base_checkpoint"), self.run_config["base_checkpoint"]
        if (theirs and theirs["sha256"]) != (ours and ours["sha256"]):
            there, here = (
                f"the base checkpoint {named['path']}" if named else "no base checkpoint"
                for named in (theirs, ours)
            )
            raise ValueError(
                f"{folder}: this checkpoint was trained with {there}, but this run uses {here}; "
                "resume with the same base checkpoint"
            )

    def _state(self, progress: TrainingProgress, optimizer_step: int | None) -> dict[str, Any]:
        """Returns the content of state.json."""
        return {
            "progress": asdict(progress),
            "optimizer_step": optimizer_step,
            "scheduler": scheduler_state.scheduler_state_of(self.scheduler),
            **loss_scale_state(self.optimizer),
            "families": {family.name: family.state_dict() for family in self.families},
            "cut": _cut(self.models),
        }

    def _load_tensors(self, folder: Path, state: dict[str, Any], same_vocabulary: bool) -> None:
        tensors.read_into(
            self.models,
            folder,
            wanted=self._wanted(),
            whole=not self.loads_what_fits,
            same_vocabulary=same_vocabulary,
        )
        if self.config.finetune or self.config.no_load_optim or self.loads_what_fits:
            self.optimizer.reload_model_params()
            return
        step = state["optimizer_step"]
        if step is None:
            raise ValueError(f"{folder}: holds no optimizer state; add --no-load-optim or --finetune")
        optimizer = OptimizerState(self.optimizer, tensors.model_state(self.models, self._keeps()))
        tensors.load_optimizer(optimizer, folder, step, same_vocabulary=same_vocabulary)
        restore_loss_scale(self.optimizer, state)

    def _load_random_state(self, folder: Path, state: dict[str, Any], progress: TrainingProgress) -> None:
        if self.config.no_load_rng:
            return
        path = folder / random_state.file_name(dist.get_rank())
        same_cut = _cut(self.models) == state["cut"]
        why = random_state.load(path) if same_cut else "the parallel layout differs from the checkpoint's"
        if why is not None:
            random_state.reseed(self.run_config["training"]["seed"], progress.iteration)
            self.message(f"random generators are re-seeded at step {progress.iteration}: {why}")


def load_weights(
    path: str,
    chunks: list[torch.nn.Module],
    families: list[Family],
    *,
    vocab_size: int | None = None,
    ckpt_step: int | None = None,
) -> Path:
    """Loads only the model, in any parallel layout, for tools that evaluate, generate or convert; collective.

    If the checkpoint refers to a base checkpoint, the base is loaded first.

    Args:
        path: a directory of checkpoints, or the directory of one checkpoint.
        chunks: this rank's model chunks, wrapped or unwrapped, built with the configuration of `read_run_config`.
        families: the model families with which the model is built.
        vocab_size: the tokenizer's vocabulary size; if it equals the checkpoint's, the embedding's padding may differ.
        ckpt_step: the step to load; None for the newest.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
        OSError: there is no checkpoint, or it cannot be read.
    """
    folder = on_first_rank(lambda: _existing(path, ckpt_step))
    stored, _ = _read_verified(folder)
    models: list[GPTModel] = unwrap_models(chunks)
    base = on_first_rank(lambda: BaseCheckpoint.of_run(stored))
    of_base: set[str] = set()
    if base is not None:
        base.load(models, stored, families)
        of_base = base.tensor_names
    tensors.read_into(
        models,
        folder,
        wanted=None if base is None else lambda name, _, names: name in names or name not in of_base,
        same_vocabulary=vocab_size == stored["vocab_size"],
    )
    return folder


def read_run_config(path: str, ckpt_step: int | None = None) -> dict[str, Any]:
    """Reads the configuration with which a checkpoint was trained; needs no process group.

    Args:
        path: a directory of checkpoints, or the directory of one checkpoint.
        ckpt_step: the step of the checkpoint; None for the newest.

    Returns:
        The configuration as JSON values: one section per config group (`model`, ...), the entry `vocab_size`, and the
        section `families`, which maps the name of each model family to its configuration.

    Raises:
        ValueError: the file is damaged.
        OSError: there is no checkpoint, or it cannot be read.
    """
    folder = _existing(path, ckpt_step)
    files.verify_checkpoint(folder, names=[files.RUN_CONFIG])
    return files.read_json(folder / files.RUN_CONFIG)


def read_step(folder: Path) -> int:
    """Returns the number of steps for which a checkpoint's model was trained; `folder` is the directory of this
    checkpoint.
    """
    return int(files.read_json(folder / files.STATE)["progress"]["iteration"])


def _existing(path: str, ckpt_step: int | None) -> Path:
    folder = files.find_checkpoint(path, ckpt_step)
    if folder is None:
        raise FileNotFoundError(f"{path}: no checkpoint found")
    return folder


def _read_verified(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verifies a checkpoint's files, and returns its run configuration and state; collective."""
    tensors.verify(folder)
    return on_every_rank(
        lambda: (files.read_json(folder / files.RUN_CONFIG), files.read_json(folder / files.STATE))
    )


def _cut(models: list[GPTModel]) -> dict[str, int]:
    """Returns the parallel sizes. If they equal the checkpoint's, every rank can restore its own random state."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "model_chunks": len(models),
        "sequence_parallel": int(models[0].config.sequence_parallel),
    }
