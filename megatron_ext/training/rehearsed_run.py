"""Converts a run to its rehearsal: two steps and an evaluation on synthetic batches; no files are read or written.

The package `rehearsal` runs it on a simulated GPU. There, `dry_run` is set in the configuration, so that model families
require neither a base model nor a directory. Schedules and curricula are those of the real run.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.run_config import C, RunConfig
from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.loop import Data
from megatron_ext.training.run_options import PLAIN, RunOptions

STEPS = 2


def as_rehearsal(config: C, families: list[Family], options: RunOptions) -> tuple[C, RunOptions]:
    """Returns the configuration and the options of a run's rehearsal.

    Args:
        config: the run's configuration, resolved.
        families: the run's model families.
        options: the run's options; a base model is not loaded, because its values do not matter.
    """
    last = options.first_iteration + STEPS
    training = replace(
        config.training,
        exit_interval=last,
        exit_duration_in_mins=None,
        eval_interval=last,
        eval_iters=min(config.training.eval_iters, 1),
        # The steps have the size after the ramp, which needs the most memory.
        global_batch_size=config.training.final_batch_size,
        rampup_batch_size=None,
        step_batch_size_schedule=None,
    )
    logging = replace(
        config.logging,
        tensorboard_dir=None,
        profile=False,
        profile_ranks=None,
        use_pytorch_profiler=False,
        pytorch_profiler_collect_shapes=False,
        pytorch_profiler_collect_callstack=False,
        wandb_project=None,
        wandb_exp_name=None,
        wandb_tags=None,
        wandb_save_dir=None,
    )
    data = made_up_data(config, families)
    changed = replace(config, training=training, checkpoint=CheckpointConfig(), logging=logging)
    return changed, replace(
        options, base=None, data=data, finish=PLAIN.finish, after_last_step=PLAIN.after_last_step
    )


def made_up_data(config: RunConfig, families: list[Family]) -> Data:
    """Returns batches with the fields, shapes and types of the run's datasets, and with meaningless values."""
    aligned = any(family.dataset_options().get("per_layer_data_path") for family in families)

    def batches(consumed_samples: int) -> Iterator[Batch]:
        while True:
            yield _batch(config, aligned)

    valid = batches if config.training.eval_iters else None
    return Data(train=batches, valid=valid, test=None)


def _batch(config: RunConfig, aligned: bool) -> Batch:
    rows, length = config.training.micro_batch_size, config.model.seq_length
    ids = torch.zeros(rows, length, dtype=torch.int64)
    batch = {
        "epoch": torch.zeros(rows, dtype=torch.int64),
        "tokens": ids,
        "labels": ids.clone(),
        "loss_mask": torch.ones(rows, length),
        "position_ids": torch.arange(length).repeat(rows, 1),
    }
    if config.data.reset_attention_mask:
        batch[DOCUMENT_STARTS] = torch.zeros(rows, length, dtype=torch.bool)
    if aligned:
        batch["per_layer_ids"] = ids.clone()
    return batch
