"""Runs NPT training in any mode: finds the base model and the initial NP weights, and names the checkpoints.

The base model, and whether a run is resumed, depend on these flags:

--load CKPT                           starts a new run on the base model CKPT
--load RUN                            resumes RUN, a directory of NPT checkpoints, on the run's base model
--base-checkpoint CKPT --load RUN     resumes RUN if it has a checkpoint; otherwise starts a new run on CKPT
neither flag                          trains a model from scratch (requires --no-freeze-base)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_engine import on_this_machine
from megatron_ext.npt.calibration.calibrated_start import calibrated_start, chosen_settings
from megatron_ext.npt.evaluation.training_samples import check_sample_length, check_samples
from megatron_ext.npt.modules.np_ranks import limit
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.layer_parallel import states_bytes
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.npt.runs import start_message as start
from megatron_ext.npt.runs.dataset_presets import with_preset
from megatron_ext.npt.runs.sequential_files import layer_of_np_key
from megatron_ext.npt.runs.sequential_run import load_under, run_sequential
from megatron_ext.npt.weights.np_factors import load_np_factors
from megatron_ext.npt.weights.np_weight_files import read_np_settings, read_np_weights
from megatron_ext.npt.weights.npt_resume import loads_what_fits, resolved_layers, stored_run
from megatron_ext.npt.weights.state_files import write_final
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import print_on_first_rank
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.run_directory import (
    check_checkpoint_args,
    check_directories,
    checkpoint_args,
)
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.loop import EXIT_OK
from megatron_ext.training.pretrain import check_run, pretrain, process_group, resolve, train
from megatron_ext.training.run_options import RunOptions
from megatron_ext.training.stop_signals import ending_at_once


def run_npt(config: NPTRunConfig) -> int:
    """Runs NPT training in the mode of the configuration; returns the process's exit code.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    config, training = settled(config), config.npt
    base, checkpoint = find_base(training, config.checkpoint)
    config = replace(config, checkpoint=checkpoint)
    if base is None and config.np.freeze_base and not config.training.dry_run:
        raise ValueError(
            "--freeze-base (the default): requires a base model; name one with --load or --base-checkpoint, "
            "or train a model from scratch with --no-freeze-base"
        )
    if _resumes(checkpoint):
        config = _with_stored_ranks(config)
    elif _calibrates(config):
        return _run_calibrated(config, base)
    if training.mode == "sequential" and not config.training.dry_run:
        return run_sequential(config, RunOptions(base=base, checkpoint_name=npt_checkpoint_name))
    module, load, trains, words = _starting_weights(config)
    config = replace(config, np=module)
    if training.mode == "sequential":  # a dry run, which shows the training of the last layer
        trains = module.layers(config.model.num_layers)[-1:]
        config = replace(config, npt=replace(training, layer_weights="uniform"))
    takes_what_fits = _has_other_layers(training, module, checkpoint)
    config = resolve(config)
    options = RunOptions(
        base=base,
        checkpoint_name=npt_checkpoint_name,
        loads_what_fits=takes_what_fits,
        prepare=partial(_prepare, config, base, load, words, trains),
        after_last_step=partial(write_final, config),
    )
    return pretrain(config, partial(make_families, trains=trains), _with_repeats(config, options))


def _resumes(checkpoint: CheckpointConfig) -> bool:
    return checkpoint.load is not None and find_checkpoint(checkpoint.load, checkpoint.ckpt_step) is not None


def _with_stored_ranks(config: NPTRunConfig) -> NPTRunConfig:
    """Returns a resumed run's configuration with the ranks that its calibration chose."""
    if limit(config.np.np_rank) is None:
        return config
    folder = find_checkpoint(str(config.checkpoint.load), config.checkpoint.ckpt_step)
    stored = read_run_config(str(folder))["families"][NPTFamily.name]["settings"]
    return replace(config, np=replace(config.np, np_rank=stored["np_rank"]))


def _calibrates(config: NPTRunConfig) -> bool:
    """Checks whether the run starts with a calibration.

    Raises:
        ValueError: the run's other settings do not fit a calibration.
    """
    if config.np.np_init_strategy != "calibrated" or config.npt.load_npt_weights or config.training.dry_run:
        return False
    given = "--np-init-strategy calibrated"
    if config.checkpoint.save is None:
        raise ValueError(f"{given}: requires --save, the directory for the calibrated weights")
    if config.npt.mode == "sequential":
        raise ValueError(
            f"{given}: not supported with --mode sequential, because a calibration computes the factors of all "
            "layers together; choose another --mode"
        )
    if config.npt.reconstructs and config.npt.stage1_steps:
        raise ValueError(
            f"--stage1-steps {config.npt.stage1_steps}: stage 1, which trains v_a to equal the attention output, would "
            f"undo {given}; pass --stage1-steps 0"
        )
    allowed = limit(config.np.np_rank)
    if allowed is not None and allowed.kl is not None and config.npt.calibration_metric != "fisher":
        raise ValueError(
            f"--np-rank {config.np.np_rank}: requires --calibration-metric fisher, which predicts the KL "
            f"(got {config.npt.calibration_metric})"
        )
    return True


def _run_calibrated(config: NPTRunConfig, base: BaseCheckpoint | None) -> int:
    """Calibrates, and trains from the result; with --train-iters 0 it only calibrates."""
    if base is None:
        raise ValueError(
            "--np-init-strategy calibrated: requires a base model; pass --load or --base-checkpoint"
        )
    trains = config.training.train_iters != 0
    config = resolve(config if trains else replace(config, training=replace(config.training, train_iters=1)))
    NPTFamily(config.np).check(config.model, config.parallel)
    tokenizer = check_run(config, lambda _: check_directories(config.checkpoint, writes=True))
    with process_group(config.parallel, config.training, config.checkpoint):
        with ending_at_once("stopped during the calibration, whose results are lost"):
            path = calibrated_start(config, base, tokenizer)
        if not trains:
            print_on_first_rank(f"written: {path.parent}")
            print_on_first_rank(_next_steps(base, path))
            return EXIT_OK
        config = replace(config, np=chosen_settings(path, config.np))
        weights = read_np_weights(str(path), config.np)
        load = partial(_start_with, weights)
        options = RunOptions(
            base=base,
            checkpoint_name=npt_checkpoint_name,
            prepare=partial(_prepare, config, base, load, f"calibrated, {path}", None),
            after_last_step=partial(write_final, config),
        )
        families = make_families(config, tokenizer)
        for family in families:
            family.check(config.model, config.parallel)
        return train(config, tokenizer, families, _with_repeats(config, options))


def _next_steps(base: BaseCheckpoint, weights: Path) -> str:
    """Returns a message that says how to evaluate calibrated weights and how to train from them."""
    loads = f"--npt-weights {weights.with_suffix('.safetensors')}"
    return (
        f"next: python tools/evaluate_npt.py --checkpoint {base.folder} {loads} --data-path HELD_OUT_PREFIX; "
        "the same command with --train-iters above 0 trains from these weights"
    )


Load = Callable[[list[GPTModel]], None]


def _starting_weights(
    config: NPTRunConfig,
) -> tuple[NPTModuleConfig, Load, tuple[int, ...] | None, str]:
    """Decides which NP weights a run starts with.

    In the mode single_layer, the other layers in the file of weights also become NPT layers of the run.

    Returns:
        The configuration of the NP components, a function that loads the initial weights, the layers to train (None for
        all), and a description of the weights.
    """
    training, module = config.npt, config.np
    fresh = start.fresh(module, config.training.seed)
    path = training.load_npt_weights
    if path is None:
        return module, RunOptions.prepare, None, fresh
    weights = read_np_weights(path, module)
    if training.mode != "single_layer":
        return module, partial(_start_with, weights), None, f"from {path}"
    (layer,) = trains = module.layers(config.model.num_layers)
    earlier = {key: tensor for key, tensor in weights.items() if layer_of_np_key(key) != layer}
    if not earlier:
        return module, partial(_start_with, weights), trains, f"from {path}"
    module = module.with_layers([layer, *map(layer_of_np_key, earlier)])
    return module, partial(load_under, layer, earlier), trains, f"from {path}, {fresh} in layer {layer}"


def _prepare(
    config: NPTRunConfig,
    base: BaseCheckpoint | None,
    load: Load,
    words: str,
    trains: tuple[int, ...] | None,
    chunks: list[GPTModel],
) -> None:
    """Loads the initial NP weights, and prints the start message."""
    load(chunks)
    path = config.checkpoint.load
    folder = find_checkpoint(path, config.checkpoint.ckpt_step) if path is not None else None
    start.print_start(
        chunks,
        config,
        base,
        weights=words if folder is None else f"from {folder}",
        total_steps=total_steps(config.training, config.parallel),
        trains=trains,
    )


def settled(config: NPTRunConfig) -> NPTRunConfig:
    """Checks NPT's config groups against the other groups; returns the configuration with missing values filled in.

    A resumed run uses the command line's learning-rate schedule, not the checkpoint's.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    training, optimizer = config.npt, config.optimizer
    num_layers = config.model.num_layers
    training.check_module(config.np, num_layers)
    check_samples(training.generation_steps, config.parallel)
    _check_cache(config)
    if not optimizer.use_checkpoint_opt_param_scheduler:
        optimizer = replace(optimizer, override_opt_param_scheduler=True)
    return replace(
        config,
        np=replace(config.np, npt_layers=resolved_layers(config.np, num_layers)),
        data=with_preset(config.data, training.dataset_preset, training.dataset_presets_file),
        optimizer=optimizer,
    )


def npt_checkpoint_name(step: int) -> str:
    """Returns the name of the directory of a checkpoint, as in docs/design/npt_curriculum.md."""
    return f"checkpoint-{step}"


def make_families(
    config: NPTRunConfig, tokenizer: Tokenizer, trains: tuple[int, ...] | None = None
) -> list[Family]:
    """Returns NPT as the run's only model family; `trains` contains the layers to train, or is None for all."""
    total = total_steps(config.training, config.parallel)
    if config.npt.generation_steps is not None:
        check_sample_length(config.npt.generation_prompt, tokenizer, config.model)
    return [NPTFamily(config.np, config.npt, total_steps=total, trains=trains, tokenizer=tokenizer)]


def total_steps(training: TrainingConfig, parallel: ParallelConfig) -> int:
    """Returns the number of steps of the run."""
    return training.resolved_train_iters(_samples_per_step(training, parallel))


def _samples_per_step(training: TrainingConfig, parallel: ParallelConfig) -> int:
    return training.resolved_global_batch_size(_copies(parallel))


def _copies(parallel: ParallelConfig) -> int:
    return parallel.data_parallel_size(max(process_groups.world_size(), parallel.model_parallel_size))


def _with_repeats(config: NPTRunConfig, options: RunOptions) -> RunOptions:
    """Returns the options with which every sample is read --teacher-cache-passes times."""
    training = config.npt
    if training.teacher_cache_steps is None:
        return options
    samples = training.teacher_cache_steps * _samples_per_step(config.training, config.parallel)
    return replace(options, epoch_samples=samples, epoch_repeats=training.teacher_cache_passes)


def _check_cache(config: NPTRunConfig) -> None:
    """Raises `ValueError` if the teacher's states do not fit into the cache."""
    training, steps = config.npt, config.npt.teacher_cache_steps
    if steps is None:
        return
    tokens = steps * _samples_per_step(config.training, config.parallel) * config.model.seq_length
    tokens //= _copies(config.parallel) * config.parallel.context_parallel_size
    per_token = states_bytes(config.model, config.parallel, config.np.layers(config.model.num_layers))
    needed = tokens * per_token / 2**30
    if needed > training.teacher_cache_gb:
        raise ValueError(
            f"--teacher-cache-steps {steps}: the teacher's states of these steps take {needed:.3g} GiB "
            "of host memory "
            f"per process ({per_token / 1000:.3g} kB per token), but --teacher-cache-gb is "
            f"{training.teacher_cache_gb:g}; raise it, or lower --teacher-cache-steps"
        )


def find_base(
    training: NPTTrainingConfig, checkpoint: CheckpointConfig
) -> tuple[BaseCheckpoint | None, CheckpointConfig]:
    """Returns the base checkpoint, and the checkpoint configuration, whose `load` is None if `--load` named the base.

    Raises:
        OSError: `--load` or `--base-checkpoint` does not exist.
        ValueError: a checkpoint is incomplete, or both flags name a base model.
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
        raise ValueError(
            f"--load {checkpoint.load}: contains a base model, but --base-checkpoint also names one; "
            "omit one of the flags"
        )
    # Training from a base model always begins at step 0, with or without --finetune.
    return base, replace(checkpoint, load=None, ckpt_step=None, finetune=False)


def checkpoint_defaults(given: Mapping[str, Any]) -> list[Found]:
    """Returns the defaults that come from the checkpoint to load.

    These are the config groups `model` and `tokenizer` and, if the checkpoint belongs to an NPT run, `np`. With
    `--additional-steps` they are all groups of that run.

    Args:
        given: values set on the command line or in the YAML file, by field name.

    Raises:
        OSError: there is no checkpoint, and the flags do not specify the model's shape either.
    """
    paths = [path for name in ("load", "base_checkpoint") if (path := given.get(name)) is not None]
    for path in paths:
        folder = find_checkpoint(path, given.get("ckpt_step"))
        if folder is None:
            continue
        source, stored = f"checkpoint {folder}", read_run_config(str(folder))
        if "additional_steps" in given:
            return [
                Found(source, stored_run(folder.resolve(), stored, given)),
                *checkpoint_args(folder, given),
            ]
        sections = {"model": on_this_machine(stored["model"]), "tokenizer": stored["tokenizer"]}
        if NPTFamily.name in stored["families"]:
            sections["np"] = stored["families"][NPTFamily.name]["settings"]
        # With dropout, student and teacher would differ even with equal weights.
        no_dropout = {"model": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}
        found = [Found(source, sections), Found("NPT trains without dropout", no_dropout)]
        return [*found, *checkpoint_args(folder, given)]
    check_checkpoint_args(given, "load", "base_checkpoint")
    if "base_checkpoint" in given or "num_layers" not in given:
        raise _no_checkpoint(given)
    return []


def weights_defaults(given: Mapping[str, Any]) -> Found:
    """Returns the defaults of the config group `np` from the file of `--load-npt-weights`.

    Flags that contradict the file are refused later, when the weights are read.

    Args:
        given: values set on the command line or in the YAML file, by field name.

    Raises:
        OSError, ValueError: the file or the configuration in it cannot be read.
    """
    path = given["load_npt_weights"]
    settings = read_np_settings(path)
    if settings is None:
        return Found(path, {})
    # These fields need not match: the weights have the same meaning with and without a trained base, and single_layer
    # may train a layer that is not in the file.
    left_out = {"freeze_base"} | ({"npt_layers"} if given.get("mode") == "single_layer" else set())
    if given.get("np_form", settings.np_form) != settings.np_form:
        # These two settings exist only for the file's form. Leave them out, so that a later error names the given
        # form and not these settings.
        left_out |= {"np_affine", "np_normalize"}
    return Found(
        path, {"np": {n: value for n, value in group_to_dict(settings).items() if n not in left_out}}
    )


def _no_checkpoint(given: Mapping[str, Any]) -> FileNotFoundError:
    name = "base_checkpoint" if "base_checkpoint" in given else "load"
    reason = "contains no checkpoint" if Path(given[name]).exists() else "no such directory"
    return FileNotFoundError(f"{flag_name(name)} {given[name]}: {reason}")


def _has_other_layers(
    training: NPTTrainingConfig, module: NPTModuleConfig, checkpoint: CheckpointConfig
) -> bool:
    folder = find_checkpoint(checkpoint.load, checkpoint.ckpt_step) if checkpoint.load is not None else None
    if folder is None:
        if training.additional_steps is not None:
            raise ValueError(
                f"--additional-steps {training.additional_steps}: requires --load with a run that can be resumed"
            )
        return False
    return loads_what_fits(training, module, read_run_config(str(folder)), folder)


def _start_with(weights: Mapping[str, Any], chunks: list[GPTModel]) -> None:
    load_np_factors(chunks, dict(weights))
