"""An NPT run, whatever its mode: which base is under it, what it starts with, what its checkpoints are called.

--load CKPT                    CKPT is a base model's: the run starts on top of it
--load RUN                     RUN holds NPT checkpoints: the run goes on, on the base that they name
--base-checkpoint CKPT --load RUN      starts on CKPT where RUN holds nothing yet, and else goes on
neither                        a model from scratch (with --no-freeze-base)
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.flags import flag_name
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.training import TrainingConfig
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.adapter import load_adapter
from megatron_ext.npt.adapter_files import read_adapter
from megatron_ext.npt.config import NPTModuleConfig
from megatron_ext.npt.family import NPTFamily
from megatron_ext.npt.presets import with_preset
from megatron_ext.npt.resume import loads_what_fits, resolved_layers, stored_run
from megatron_ext.npt.samples import check_samples
from megatron_ext.npt.sequential import load_under, run_sequential
from megatron_ext.npt.sequential_state import layer_of, with_layers
from megatron_ext.npt.settings import NPTTrainingConfig
from megatron_ext.npt.state_files import write_final
from megatron_ext.platform import distributed
from megatron_ext.training.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint import read_run_config
from megatron_ext.training.checkpoint_files import find_checkpoint
from megatron_ext.training.family import Family
from megatron_ext.training.run import RunOptions, pretrain


def run(configs: dict[str, Any]) -> int:
    """Trains; returns the process's exit code.

    Args:
        configs: `config.concerns.TRAINING`, `npt` (NPTTrainingConfig) and `np` (NPTModuleConfig).

    Raises:
        ValueError, OSError: a user's mistake, told in one line.
    """
    training: NPTTrainingConfig = configs["npt"]
    prepare_configs(configs)
    module: NPTModuleConfig = configs["np"]
    base, configs["checkpoint"] = find_base(training, configs["checkpoint"])
    if base is None and module.freeze_base and not configs["training"].dry_run:
        raise ValueError(
            "--freeze-base: there is no base model; give --load or --base-checkpoint, or --no-freeze-base"
        )
    if training.mode == "sequential" and not configs["training"].dry_run:
        return run_sequential(configs, RunOptions(base=base, checkpoint_name=checkpoint_name))
    weights = read_adapter(training.load_npt_weights, module) if training.load_npt_weights else None
    prepare = partial(_start_with, weights) if weights is not None else RunOptions.prepare
    trains = None
    if training.mode == "single_layer" and weights is not None:
        (layer,) = trains = module.layers(configs["model"].num_layers)
        earlier = {key: tensor for key, tensor in weights.items() if layer_of(key) != layer}
        if earlier:
            module = configs["np"] = with_layers(module, [layer, *map(layer_of, earlier)])
            prepare = partial(load_under, layer, earlier)
    options = RunOptions(
        base=base,
        checkpoint_name=checkpoint_name,
        loads_what_fits=_has_other_layers(training, module, configs["checkpoint"]),
        prepare=prepare,
        finish=partial(write_final, configs),
    )
    return pretrain(configs, partial(make_families, trains=trains), options)


def prepare_configs(configs: dict[str, Any]) -> None:
    """Checks NPT's configurations against the others, and settles what they leave open.

    On --load the command line's schedule counts, not the checkpoint's.

    Raises:
        ValueError, OSError: a user's mistake, told in one line.
    """
    training: NPTTrainingConfig = configs["npt"]
    num_layers = configs["model"].num_layers
    training.check_module(configs["np"], num_layers)
    check_samples(training.generation_steps, configs["parallel"])
    configs["np"] = replace(configs["np"], npt_layers=resolved_layers(configs["np"], num_layers))
    configs["data"] = with_preset(configs["data"], training.dataset_preset, training.dataset_presets_file)
    if not configs["optimizer"].use_checkpoint_opt_param_scheduler:
        configs["optimizer"] = replace(configs["optimizer"], override_opt_param_scheduler=True)


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's directory, as document 001's."""
    return f"checkpoint-{step}"


def make_families(
    configs: dict[str, Any], tokenizer: Tokenizer, trains: tuple[int, ...] | None = None
) -> list[Family]:
    """NPT alone; of its layers `trains`, or all, are trained."""
    total = total_steps(configs["training"], configs["parallel"])
    return [NPTFamily(configs["np"], configs["npt"], total_steps=total, trains=trains, tokenizer=tokenizer)]


def total_steps(training: TrainingConfig, parallel: ParallelConfig) -> int:
    """Optimizer steps of the run."""
    copies = parallel.data_parallel_size(max(distributed.world_size(), parallel.model_parallel_size))
    return training.resolved_train_iters(training.resolved_global_batch_size(copies))


def find_base(
    training: NPTTrainingConfig, checkpoint: CheckpointConfig
) -> tuple[BaseCheckpoint | None, CheckpointConfig]:
    """The base under the run, and the checkpoint configuration without it.

    Raises:
        OSError: `--load` or `--base-checkpoint` is not there.
        ValueError: a checkpoint is not complete.
    """
    folder = find_checkpoint(checkpoint.load, checkpoint.ckpt_step) if checkpoint.load is not None else None
    stored = read_run_config(str(folder)) if folder is not None else {}
    goes_on = NPTFamily.name in stored.get("families", {})
    if training.base_checkpoint is not None:
        base: BaseCheckpoint | None = BaseCheckpoint.find(training.base_checkpoint)
    elif goes_on:
        base = BaseCheckpoint.of_run(stored)
    else:
        base = BaseCheckpoint.find(checkpoint.load, checkpoint.ckpt_step) if checkpoint.load else None
    if goes_on or folder is None:
        return base, checkpoint
    if training.base_checkpoint is not None:
        raise ValueError(f"--load {checkpoint.load}: holds a base model, and --base-checkpoint names one too")
    return base, replace(checkpoint, load=None, ckpt_step=None)


def stored_defaults(given: Mapping[str, str]) -> dict[str, Any]:
    """Sections `model` and `tokenizer` of the checkpoint that a run loads, and `np` of one that it continues.

    Args:
        given: the flags of the command line by field name.

    Raises:
        OSError: none is there, and the flags do not tell the model's shape either.
    """
    paths = [path for name in ("load", "base_checkpoint") if (path := given.get(name)) is not None]
    step = int(given["ckpt_step"]) if given.get("ckpt_step", "").isdigit() else None
    for path in paths:
        folder = find_checkpoint(path, step)
        if folder is None:
            continue
        stored = read_run_config(str(folder))
        if "additional_steps" in given:
            return stored_run(folder.resolve(), stored, given)
        sections = {
            # Dropout would tell student and teacher apart.
            "model": stored["model"] | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
            "tokenizer": stored["tokenizer"],
        }
        if NPTFamily.name in stored["families"]:
            sections["np"] = stored["families"][NPTFamily.name]["settings"]
        return sections
    if "base_checkpoint" in given or "num_layers" not in given:
        raise _no_checkpoint(given)
    return {}


def _no_checkpoint(given: Mapping[str, str]) -> FileNotFoundError:
    name = "base_checkpoint" if "base_checkpoint" in given else "load"
    path = given[name]
    hint = (
        "; a Hugging Face directory is imported with tools/convert_checkpoint.py"
        if (Path(path) / "config.json").is_file()
        else ""
    )
    return FileNotFoundError(f"{flag_name(name)} {path}: no checkpoint there{hint}")


def _has_other_layers(
    training: NPTTrainingConfig, module: NPTModuleConfig, checkpoint: CheckpointConfig
) -> bool:
    folder = find_checkpoint(checkpoint.load, checkpoint.ckpt_step) if checkpoint.load is not None else None
    if folder is None:
        if training.additional_steps is not None:
            raise ValueError(
                f"--additional-steps {training.additional_steps}: --load names no run to go on with"
            )
        return False
    return loads_what_fits(training, module, read_run_config(str(folder)), folder)


def _start_with(weights: Mapping[str, Any], chunks: list[GPTModel]) -> None:
    load_adapter(chunks, dict(weights))
