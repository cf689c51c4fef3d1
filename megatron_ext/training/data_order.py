"""Does a run that goes on find the samples that its checkpoint has taken where it looks for them?

A run counts the samples it has taken and goes on behind them. That holds in one order of the samples. Another sequence
length, seed, split or dataset makes another one, and so may another length of the run: as in Megatron-LM, the epochs
that a run needs are shuffled together. Then the run goes on, but the user is told.
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
"""Key of a run's configuration: the sequences for which its training set was made."""

_DECIDING = (
    ("model", "seq_length"),
    ("training", "seed"),
    ("data", "data_path"),
    ("data", "train_data_path"),
    ("data", "split"),
)


def tell_of_other_order(config: CheckpointConfig, run: Mapping[str, Any], progress: TrainingProgress) -> None:
    """Prints a line where the order of the training samples is not that of the checkpoint that was loaded.

    Args:
        config: what was loaded.
        run: the run's configuration, with sections `model`, `training` and `data`, and `TRAINING_SAMPLES`.
        progress: of the checkpoint.

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
    ):  # batches of the caller's own, in an order that is not known here
        return
    reasons = [
        f"{flag_name(name)} is {_text(run[section][name])} here and {_text(stored[section][name])} in the checkpoint"
        for section, name in _DECIDING
        if _text(run[section][name]) != _text(stored[section][name])
    ]
    reasons = reasons or _other_epochs(run, stored)
    if reasons:
        print_on_first_rank(
            f"the training data is in another order: {'; '.join(reasons)}; of the {progress.consumed_samples} samples "
            "taken before, some may come again while others are left out"
        )


def _other_epochs(run: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    ours, theirs = run[TRAINING_SAMPLES], stored.get(TRAINING_SAMPLES)
    if theirs is None or ours == theirs:
        return []
    data = group_in(DataConfig, run, "data")
    sequence_length = run["model"]["seq_length"]
    if shuffled_epochs(data, sequence_length, ours) == shuffled_epochs(data, sequence_length, theirs):
        return []
    return [
        f"a run of {ours} samples shuffles other epochs together than the checkpoint's of {theirs}, "
        "see --train-iters and --global-batch-size"
    ]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).replace(" ", "")
