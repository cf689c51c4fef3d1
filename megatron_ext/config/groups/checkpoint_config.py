"""Where checkpoints are written and read, how often, and what they hold.

Exit codes of the entry points: 0 done; 1 an unexpected error, with its traceback; 2 the user's mistake, one line;
the codes of a run that saved and left early on a signal are documented where the signals are handled.
"""

from dataclasses import dataclass
from typing import Annotated

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, flag


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    save: Annotated[str | None, flag(aliases=("--checkpoint_dir",))] = None
    """Directory to write checkpoints to: empty, missing, or the one that --load goes on from."""

    load: Annotated[str | None, flag(aliases=("--resume_from",))] = None
    """Directory to load a checkpoint from; where it is `--save` too and holds none, a new run starts."""

    save_interval: Annotated[int | None, flag(aliases=("--save_steps",))] = None
    """Optimizer steps between two checkpoints. Without it only at the end."""

    ckpt_step: int | None = None
    """Step to load, instead of the newest complete one."""

    no_save_optim: Switch = False
    """Leave the optimizer's state out of checkpoints."""

    no_load_optim: Switch = False
    """Do not load the optimizer's state."""

    no_save_rng: Switch = False
    """Leave the random number generators' state out of checkpoints."""

    no_load_rng: Switch = False
    """Do not load the random number generators' state."""

    finetune: bool = False
    """Load the model only and start at step 0, with a new optimizer and new data order."""

    keep_last: int | None = None
    """Complete checkpoints to keep; older ones are removed after a save. Without it all are kept."""

    overwrite_checkpoints: bool = False
    """Let the run take the place of another one in --save, or of the steps after the one that is loaded: their
    checkpoints are removed once this run has written its first."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "save_interval", "keep_last")
        check_at_least(self, 0, "ckpt_step")
        for name, value in (("--save-interval", self.save_interval), ("--keep-last", self.keep_last)):
            if value is not None and self.save is None:
                raise ValueError(f"{name} {value}: needs --save")
        if self.overwrite_checkpoints and self.save is None:
            raise ValueError("--overwrite-checkpoints: needs --save")
        if self.ckpt_step is not None and self.load is None:
            raise ValueError(f"--ckpt-step {self.ckpt_step}: needs --load")
        if self.finetune and self.load is None:
            raise ValueError("--finetune: needs --load")
