"""Writes the files described in docs/design/npt_curriculum.md into every NPT checkpoint.

At the end of a run, `npt_weights.pt` and `config.json` are also written to `final/`.

    npt_weights.pt          all NP factors as whole tensors, under the keys of `np_factors`
    training_state.pt       global_step, batch_count, optimizer_state_dict, scheduler_state_dict, scaler_state_dict
    multi_layer_state.pt    layers_to_train, curriculum_schedule, current_stage_index, layer_weights, teacher_cache
    config.json             the run's whole configuration; NPT's settings under "np"

These files are for people and other programs: they contain only tensors and plain values, and load with `weights_only`.
A resumed run does not read them; it reads the files of `checkpoint_files` in the same directory. Only those files
contain Adam's moments, as sharded tensors; `optimizer_state_dict["state"]` lists the tensors' names.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.serialize import config_to_dict, group_to_dict
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.curriculum import Stage, stage_index
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.objective.teacher import TeacherCache
from megatron_ext.npt.weights.np_factors import gather_np_factors
from megatron_ext.npt.weights.np_weight_files import CONFIG, WEIGHTS, write_np_weights
from megatron_ext.platform.collectives import on_first_rank
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress

TRAINING_STATE, MULTI_LAYER_STATE = "training_state.pt", "multi_layer_state.pt"


def write_state_files(
    folder: Path,
    chunks: list[GPTModel],
    settings: NPTModuleConfig,
    state: Mapping[str, Any],
    multi_layer: Mapping[str, Any],
) -> None:
    """Writes the four files described at the top of this module; collective.

    Args:
        folder: the temporary directory in which the checkpoint is being written.
        chunks: this rank's model chunks, unwrapped.
        settings: NPT's configuration.
        state: the run's state, as passed to `Family.write_files`.
        multi_layer: the result of `multi_layer_state`.
    """
    tensors = gather_np_factors(chunks)

    def write() -> None:
        files.write_tensors(folder / WEIGHTS, tensors)
        files.write_tensors(folder / TRAINING_STATE, training_state(state))
        files.write_tensors(folder / MULTI_LAYER_STATE, dict(multi_layer))
        config = {**state["run_config"], "np": group_to_dict(settings)}
        files.write_text(folder / CONFIG, json.dumps(config, indent=1))

    on_first_rank(write)


def training_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `training_state.pt`, as plain values.

    `batch_count` is the number of micro-batches that one data-parallel rank has processed, if all of them had the
    current micro-batch size.

    Args:
        state: the run's state, as passed to `Family.write_files`.
    """
    progress, run = state["progress"], state["run_config"]
    cut, optimizer = state["cut"], run.get("optimizer", {})
    shares = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    copies = cut["world_size"]
    for share in shares:
        copies //= cut[share]
    at_once = copies * run["training"]["micro_batch_size"]
    constants = {
        "betas": (optimizer.get("adam_beta1"), optimizer.get("adam_beta2")),
        "eps": optimizer.get("adam_eps"),
        "weight_decay": optimizer.get("weight_decay"),
    }
    return {
        "global_step": progress["iteration"],
        "batch_count": progress["consumed_samples"] // at_once,
        "optimizer_state_dict": {
            "step": state["optimizer_step"],
            "param_groups": [{**group, **constants} for group in state["scheduler"]["groups"]],
            "state": {
                "format": "torch_dist",
                "files": "*.distcp",
                "exp_avg": "optimizer.state.exp_avg.{parameter}",
                "exp_avg_sq": "optimizer.state.exp_avg_sq.{parameter}",
            },
        },
        "scheduler_state_dict": dict(state["scheduler"]),
        # Empty without --fp16, like the state of a disabled torch GradScaler.
        "scaler_state_dict": state.get("loss_scale") or {},
        "consumed_samples": progress["consumed_samples"],
        "skipped_steps": progress["skipped_steps"],
    }


def multi_layer_state(
    weights: Mapping[int, float], stages: tuple[Stage, ...], cache: TeacherCache, iteration: int
) -> dict[str, Any]:
    """Returns the content of `multi_layer_state.pt`, as plain values.

    Args:
        weights: maps the index of each NPT layer to the weight of its losses.
        stages: the curriculum.
        cache: the teacher's cache on this rank.
        iteration: number of the last step. The stored stage belongs to the next step, with which a resumed run
            begins.
    """
    return {
        "layers_to_train": sorted(weights),
        "curriculum_schedule": [
            {
                "name": stage.name,
                "steps": stage.steps,
                "attn_ratio": stage.attention_share,
                "mlp_ratio": stage.mlp_share,
            }
            for stage in stages
        ],
        "current_stage_index": stage_index(stages, iteration + 1),
        "layer_weights": dict(sorted(weights.items())),
        "teacher_cache": {
            "hits": cache.hits,
            "misses": cache.misses,
            "sequences": len(cache.states),
            "bytes": cache.bytes,
            "max_bytes": cache.max_bytes,
        },
    }


def write_final(config: NPTRunConfig, chunks: list[GPTModel], progress: TrainingProgress) -> None:
    """Writes the directory `final/` atomically into the directory of `--save`; without `--save`, does nothing.
    Collective.

    Args:
        config: the run's configuration.
        chunks: this rank's model chunks, unwrapped.
        progress: the number of completed steps and consumed samples.

    Raises:
        OSError: the files could not be written; raised on every rank.
    """
    save = config.checkpoint.save
    if save is None:
        return
    tensors = gather_np_factors(chunks)
    more = {**config_to_dict(config), **asdict(progress), "global_step": progress.iteration}
    on_first_rank(lambda: replace_final(Path(save), tensors, config.np, more))


def replace_final(
    root: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: NPTModuleConfig,
    more: Mapping[str, Any],
    *,
    name: str = files.FINAL,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a directory of NP weights, by default `final/`, atomically; call this on one rank only.

    Args:
        root: the directory that contains the checkpoints, and will contain the new directory.
        tensors: the NP factors.
        settings: NPT's configuration.
        more: further entries for `config.json`.
        name: name of the new directory.
        texts: maps the name of each further file in the new directory to its content.
    """
    # The temporary directories are named like those of an interrupted save, so that the next save removes or restores
    # them.
    writing, replaced, final = (root / f"{prefix}{name}" for prefix in (files.WRITING, files.REPLACED, ""))
    for leftover in (writing, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    writing.mkdir(parents=True)
    write_np_weights(writing, tensors, settings, more)
    for file, text in (texts or {}).items():
        files.write_text(writing / file, text)
    files.digests(writing, [path.name for path in writing.iterdir()])  # also flushes the files to disk
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    files.fsync_path(root)
    if replaced.exists():
        shutil.rmtree(replaced)
