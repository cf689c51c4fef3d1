"""Options with which scripts, and series of training runs, deviate from plain pretraining."""

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
    """Deviations of a run from plain pretraining; the defaults mean plain pretraining."""

    base: BaseCheckpoint | None = None
    """A checkpoint with the base model's weights. If it is given, the run's own checkpoints omit frozen parameters."""

    checkpoint_name: Callable[[int], str] = checkpoint_name
    """Returns the name of a step's checkpoint directory; `checkpoint_files.step_of` must be able to parse it."""

    loads_what_fits: bool = False
    """Whether --load loads only tensors that exist in both checkpoint and run, and starts a new optimizer state."""

    prepare: Callable[[list[GPTModel]], None] = lambda chunks: None
    """Called after the base model is loaded, before the model is wrapped and a checkpoint of the run is loaded;
    collective.
    """

    begin: Callable[[list[GPTModel], MegatronOptimizer], None] = lambda chunks, optimizer: None
    """Called before the first step of a run that does not resume from a checkpoint; collective."""

    finish: Callable[[list[GPTModel], TrainingProgress], None] = lambda chunks, progress: None
    """Called after the last step and the final evaluation; collective."""

    after_last_step: Callable[[list[GPTModel], TrainingProgress], None] = lambda chunks, progress: None
    """Called after the last step, before the final evaluation; collective."""

    first_sample: int = 0
    """Number of training sequences that earlier runs of a series have consumed; this run begins after them."""

    first_iteration: int = 0
    """Number of steps that earlier runs of a series have done. Step numbers continue from there; the learning-rate
    schedule restarts.
    """

    data: Data | None = None
    """The caller's batches, used instead of --data-path."""

    epoch_samples: int | None = None
    """Number of sequences per epoch, if several epochs are to have the same sequences; see `epoch_repeats`. If None,
    documents are packed anew in each epoch, as megatron-core does.
    """

    epoch_repeats: int | None = None
    """Number of epochs in a row that have the same `epoch_samples` sequences. The epochs after them have the next
    sequences. If None, all epochs have the same sequences.
    """

    samples: int | None = None
    """Number of sequences that all runs of a series consume, shuffled together; None for a single run."""


PLAIN = RunOptions()
"""Options of plain pretraining."""
