"""Warns when a resumed run reads its training samples in another order than the checkpoint's run.

A resumed run skips as many samples as the checkpoint has consumed, which is correct only for the same order of samples.
Another sequence length, seed, split or dataset changes the order. Another number of steps may change it too because, as
in Megatron-LM, all epochs that a run needs are shuffled together. In all these cases the run prints a warning and
continues.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.data.datasets.epochs import shuffled_epochs
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import print_on_first_rank
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress, read_run_config

TRAINING_SAMPLES = "training_samples"
"""Key in the run configuration. Its value is the number of sequences in the training set."""

_DECIDING = (
    ("model", "seq_length"),
    ("training", "seed"),
    ("data", "data_path"),
    ("data", "train_data_path"),
    ("data", "mock_data"),
    ("data", "split"),
)


def tell_of_other_order(config: CheckpointConfig, run: Mapping[str, Any], progress: TrainingProgress) -> None:
    """Prints a warning if the run's training samples are in another order than those of the loaded checkpoint.

    Args:
        config: the run's checkpoint flags, which name the loaded checkpoint.
        run: the run's configuration, with the sections `model`, `training`, `data` and the key `TRAINING_SAMPLES`.
        progress: the checkpoint's progress.

    Raises:
        OSError, ValueError: the checkpoint or the run's data cannot be read.
    """
    if config.load is None or progress.consumed_samples == 0 or process_groups.rank() != 0:
        return
    if find_checkpoint(config.load, config.ckpt_step) is None:
        return
    stored = read_run_config(config.load, config.ckpt_step)
    if (
        "data" not in run or "data" not in stored
    ):  # the caller supplies the batches, whose order is unknown here
        return
    reasons = [
        f"{flag_name(name)} is {ours} now and {theirs} in the checkpoint"
        for section, name in _DECIDING
        # A checkpoint may lack a flag that is newer than the checkpoint.
        for ours, theirs in [(_text(run[section][name]), _text(stored[section].get(name, False)))]
        if ours != theirs
    ]
    reasons = reasons or _other_epochs(run, stored)
    if reasons:
        print_on_first_rank(
            f"the order of the training data has changed: {'; '.join(reasons)}; some of the "
            f"{progress.consumed_samples} samples used so far may be repeated, and other samples may never be used"
        )


def _other_epochs(run: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    ours, theirs = run[TRAINING_SAMPLES], stored.get(TRAINING_SAMPLES)
    if theirs is None or ours == theirs:
        return []
    data = group_in(DataConfig, run, "data")
    if data.mock_data:
        return []
    sequence_length = run["model"]["seq_length"]
    if shuffled_epochs(data, sequence_length, ours) == shuffled_epochs(data, sequence_length, theirs):
        return []
    return [
        f"the run has {ours} samples and the checkpoint's run {theirs}, so different epochs are shuffled together "
        "(see --train-iters and --global-batch-size)"
    ]


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).replace(" ", "")
