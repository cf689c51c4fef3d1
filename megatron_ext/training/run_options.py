"""What a script's way of training differs in from plain pretraining."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import checkpoint_name
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.loop import Data


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a script's way of training differs in from plain pretraining."""

    base: BaseCheckpoint | None = None
    """A checkpoint whose model is loaded under the run; the run's own leave out what is frozen."""

    checkpoint_name: Callable[[int], str] = checkpoint_name
    """Step -> name of a checkpoint's directory, one that `checkpoint_files.step_of` reads."""

    loads_what_fits: bool = False
    """On --load take the tensors that checkpoint and run share, and start the optimizer anew."""

    prepare: Callable[[list[GPTModel]], None] = lambda chunks: None
    """Called on the loaded model before it is wrapped, and before a checkpoint of the run is loaded; collective."""

    begin: Callable[[list[GPTModel], MegatronOptimizer], None] = lambda chunks, optimizer: None
    """Called before the first step of a run that is not loaded from a checkpoint; collective."""

    finish: Callable[[list[GPTModel], TrainingProgress], None] = lambda chunks, progress: None
    """Called after the last step; collective."""

    first_sample: int = 0
    """Sequences of the training set that earlier trainings of a series have taken: the run begins after them."""

    first_iteration: int = 0
    """Steps that earlier trainings of a series have done: the run counts on from them, its schedule does not."""

    data: Data | None = None
    """Batches of the caller's, in place of --data-path."""

    epoch_samples: int | None = None
    """Sequences of an epoch, the same ones in every epoch; None for mcore's, which packs documents anew each time."""

    samples: int | None = None
    """Sequences that the whole series takes, in one order; None for a run that stands alone."""


PLAIN = RunOptions()
"""Plain pretraining."""
