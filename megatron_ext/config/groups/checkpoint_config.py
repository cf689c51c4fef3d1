"""Settings of checkpoints: where they are saved and loaded, how often they are saved, and what they hold."""

from dataclasses import dataclass
from typing import Annotated

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, flag, flag_name


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Flags for saving and loading checkpoints."""

    save: Annotated[str | None, flag(aliases=("--checkpoint_dir",))] = None
    """Directory to write checkpoints to: a new or empty one, or the --load directory of the run that is continued."""

    load: Annotated[str | None, flag(aliases=("--resume_from",))] = None
    """Directory to load a checkpoint from. If it equals --save and has no checkpoint yet, a new run starts."""

    save_interval: Annotated[int | None, flag(aliases=("--save_steps",))] = None
    """Optimizer steps between two checkpoints. Default: save only at the end."""

    async_save: bool = False
    """Write checkpoints from a copy in host memory while training continues; training waits only for the copy."""

    use_checkpoint_args: bool = False
    """Take the model's shape from the checkpoint, if there is one, and print each flag that differs from the
    checkpoint. Without --use-checkpoint-args, the checkpoint's shape is the default, and a different value is an
    error.
    """

    ckpt_step: int | None = None
    """Step of the checkpoint to load. Default: the newest complete checkpoint."""

    no_save_optim: Switch = False
    """Leave the optimizer's state out of checkpoints."""

    no_load_optim: Switch = False
    """Do not load the optimizer's state."""

    no_save_rng: Switch = False
    """Leave the random number generators' state out of checkpoints."""

    no_load_rng: Switch = False
    """Do not load the random number generators' state."""

    finetune: bool = False
    """Load only the model's weights and start at step 0, with a new optimizer state and a new data order."""

    keep_last: int | None = None
    """Number of complete checkpoints to keep; older ones are deleted after each save. Default: keep all."""

    overwrite_checkpoints: bool = False
    """Allow this run to replace checkpoints in --save that belong to another run or are later than the loaded step.
    The old checkpoints are deleted once this run has written its first checkpoint.
    """

    def __post_init__(self) -> None:
        check_at_least(self, 1, "save_interval", "keep_last")
        check_at_least(self, 0, "ckpt_step")
        for name, value in (("--save-interval", self.save_interval), ("--keep-last", self.keep_last)):
            if value is not None and self.save is None:
                raise ValueError(f"{name} {value}: requires --save")
        for name in ("overwrite_checkpoints", "async_save"):
            if getattr(self, name) and self.save is None:
                raise ValueError(f"{flag_name(name)}: requires --save")
        for name in ("save", "load"):
            if "://" in (path := getattr(self, name) or ""):
                raise ValueError(
                    f"{flag_name(name)} {path}: addresses are not supported; mount the storage, and pass a directory"
                )
        if self.ckpt_step is not None and self.load is None:
            raise ValueError(f"--ckpt-step {self.ckpt_step}: requires --load")
        if self.finetune and self.load is None:
            raise ValueError("--finetune: requires --load")
