"""Carries out a whole pretraining run, in this order:

    check -> tokenizer -> families -> process group -> model -> optimizer -> checkpoint -> data -> loop

If possible, user errors are found before the process group starts, so that they are reported immediately and no rank
waits for another.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from megatron.core import parallel_state

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.data_config import DataConfig, is_number
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.run_config import C, RunConfig
from megatron_ext.config.serialize import config_to_dict
from megatron_ext.data.datasets.epochs import epoch_samples
from megatron_ext.data.datasets.loader_processes import loader_failures
from megatron_ext.data.indexed.manifest import begin_of_documents, check_dataset
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import training_flops_per_token
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_engine import check_te, note_without_te
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import on_every_rank, on_first_rank, print_on_first_rank
from megatron_ext.platform.hosts.rank_progress import watch_ranks
from megatron_ext.platform.run_phases import MODEL, in_phase
from megatron_ext.training.checkpoint import scheduler_state
from megatron_ext.training.checkpoint.checkpoint_files import BEGIN, check_writable
from megatron_ext.training.checkpoint.checkpointer import Checkpointer, TrainingProgress
from megatron_ext.training.checkpoint.run_directory import check_directories
from megatron_ext.training.checkpoint.run_lock import run_lock
from megatron_ext.training.data_order import TRAINING_SAMPLES, tell_of_other_order
from megatron_ext.training.dry_run_report import planned_world_size, print_dry_run
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.logging.family_costs import run_cost
from megatron_ext.training.logging.profiling import profiling
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.loop import EXIT_OK, Loop
from megatron_ext.training.planned_memory import check_memory
from megatron_ext.training.rehearsed_run import as_rehearsal
from megatron_ext.training.run_data import build_data, training_samples
from megatron_ext.training.run_options import PLAIN, RunOptions

MakeFamilies = Callable[[C, Tokenizer], list[Family]]
"""Builds the model families of a run from its configuration and tokenizer."""


def pretrain(config: C, make_families: MakeFamilies[C], options: RunOptions = PLAIN) -> int:
    """Runs pretraining.

    Args:
        config: the run's configuration, including the model families' groups.
        make_families: builds the run's model families; called once.
        options: deviations from plain pretraining.

    Returns:
        The process's exit code.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    config = resolve(config)
    if config.training.dry_run and not config.rehearsal.is_on:
        print_dry_run(config, make_families)
        return EXIT_OK
    writes = not config.training.skip_train
    tokenizer = check_run(config, lambda _: check_directories(config.checkpoint, writes=writes))
    families = make_families(config, tokenizer)
    for family in families:
        family.check(config.model, config.parallel)
    if config.rehearsal.is_on:
        config, options = as_rehearsal(config, families, options)
    with process_group(config.parallel, config.training, config.checkpoint):
        return train(config, tokenizer, families, options)


def resolve(config: C) -> C:
    """Checks the configuration for the run's number of processes; returns it with the length in steps or samples.

    Raises:
        ValueError: settings contradict each other, or do not fit the number of processes.
        OSError: the length is in epochs, and the data cannot be read.
    """
    training, in_epochs = config.training, config.training.num_epochs is not None
    training.check_has_steps()
    world_size = planned_world_size(config) if training.dry_run else process_groups.world_size()
    samples = epoch_samples(config.data, config.model.seq_length) if in_epochs else None
    return config.resolved(world_size, epoch_samples=samples)


def check_run(
    config: RunConfig, check_others: Callable[[Tokenizer], None] = lambda tokenizer: None
) -> Tokenizer:
    """Checks everything that can be checked before the process group starts, and returns the tokenizer.

    Args:
        config: the run's configuration, resolved.
        check_others: the caller's own checks; called before anything is written.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    check_te(config.model, config.parallel)
    tokenizer = build_tokenizer(config.tokenizer)
    if not config.rehearsal.is_on:
        check_others(tokenizer)
        _check_files(config.data, config.checkpoint, tokenizer)
    return tokenizer


@contextmanager
def process_group(
    parallel: ParallelConfig, training: TrainingConfig, checkpoint: CheckpointConfig
) -> Iterator[None]:
    """Context manager: starts the process group, seeds the random generators, and locks the --save directory."""
    random.seed(training.seed)
    np.random.seed(training.seed)
    process_groups.initialize(parallel, training.seed)
    try:
        with (
            watch_ranks(parallel.distributed_timeout_minutes),
            run_lock(None if training.skip_train else checkpoint.save),
            loader_failures(),
        ):
            yield
    finally:
        process_groups.shutdown()


def _check_files(data: DataConfig, checkpoint: CheckpointConfig, tokenizer: Tokenizer) -> None:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    paths = {flag_name(name): getattr(data, name) or () for name in names}
    prefixes = [(flag, prefix) for flag, path in paths.items() for prefix in path if not is_number(prefix)]
    if not prefixes and not data.mock_data:
        raise ValueError("no training data was given; pass --data-path or --train-data-path, or --mock-data")
    for flag, prefix in prefixes:
        try:
            check_dataset(prefix, tokenizer)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{flag} {prefix}: {error}") from error
    if checkpoint.save is not None and process_groups.rank() == 0:
        check_writable(checkpoint.save)


def train(
    config: RunConfig, tokenizer: Tokenizer, families: list[Family], options: RunOptions = PLAIN
) -> int:
    """Trains in an existing process group; same as `pretrain`, but without its checks. Collective.

    Args:
        config: the run's configuration, resolved.
        tokenizer: the tokenizer of the training data.
        families: the run's model families, already checked against the model and its parallel layout.
        options: deviations from plain pretraining.

    Returns:
        The process's exit code.
    """
    training = config.training
    copies = parallel_state.get_data_parallel_world_size()
    if not config.rehearsal.is_on:
        on_every_rank(lambda: check_memory(config, tokenizer, families, copies))
    global_batch_size = training.resolved_global_batch_size(copies)
    run_config = run_configuration(config, tokenizer)
    run_config |= {TRAINING_SAMPLES: training_samples(training, global_batch_size, options)}
    tokenizer.begin_as(run_config[BEGIN])
    chunks = _build_model(config, run_config, families, options)
    stepper = _build_stepper(config, chunks, families, options, global_batch_size)
    checkpointer = Checkpointer(
        config.checkpoint,
        chunks=stepper.chunks,
        optimizer=stepper.optimizer,
        scheduler=stepper.scheduler,
        run_config=run_config,
        families=families,
        base=options.base,
        name=options.checkpoint_name,
        loads_what_fits=options.loads_what_fits,
    )
    progress = _begin(config, checkpointer, stepper, options)
    data = options.data or build_data(config, tokenizer, families, global_batch_size, options)
    if options.data is None:
        tell_of_other_order(config.checkpoint, run_config, progress)
    with (
        _build_reporter(config, families, progress, global_batch_size) as reporter,
        profiling(config.logging, reporter.message) as before_step,
    ):
        loop = Loop(
            training,
            config.checkpoint,
            stepper,
            checkpointer,
            reporter,
            data,
            sequence_length=config.model.seq_length,
            flops_per_token=partial(_flops_per_token, config, tokenizer.vocab_size, families),
            after_last_step=partial(options.after_last_step, chunks),
            before_step=before_step,
        )
        if training.skip_train:
            return loop.evaluate_only(progress)
        code, progress = loop.run(progress)
        if loop.is_complete(progress):
            options.finish(chunks, progress)
        return code


@in_phase(MODEL)
def _build_model(
    config: RunConfig, run_config: dict[str, Any], families: list[Family], options: RunOptions
) -> list[GPTModel]:
    """Builds this rank's chunks, loads the base model's weights, and lets the model families freeze parameters."""
    note = note_without_te(config.model)
    if note is not None:
        print_on_first_rank(note)
    chunks = build_model(
        config.model,
        config.parallel,
        vocab_size=run_config["vocab_size"],
        seed=config.training.seed,
        precision=config.training.precision,
        extensions=[family.extension() for family in families],
        fuses_norms=True,
    )
    if options.base is not None:
        named = {**run_config, "families": {family.name: family.configuration() for family in families}}
        options.base.load(chunks, named, families)
    for family in families:
        family.prepare_model(chunks)
    options.prepare(chunks)
    return chunks


def _build_stepper(
    config: RunConfig,
    chunks: list[GPTModel],
    families: list[Family],
    options: RunOptions,
    global_batch_size: int,
) -> Stepper:
    parallel, training = config.parallel, config.training
    wrapped = wrap_model(chunks, parallel, precision=training.precision)
    optimizer = build_optimizer(config.optimizer, parallel, wrapped, families, precision=training.precision)
    if options.first_iteration:
        # Every run of a series has its own learning-rate schedule, although the step numbers continue.
        steps = training.resolved_train_iters(global_batch_size) - options.first_iteration
        training = replace(training, train_iters=steps, train_samples=None)
    return Stepper(
        wrapped,
        families,
        optimizer,
        build_scheduler(config.optimizer, training, optimizer, global_batch_size, options.first_sample),
        global_batch_size=global_batch_size,
        micro_batch_size=training.micro_batch_size,
        clip_grad=config.optimizer.clip_grad,
        log_params_norm=config.logging.log_params_norm,
        log_num_zeros_in_grad=config.logging.log_num_zeros_in_grad,
        per_token_loss=training.calculate_per_token_loss,
        empty_memory_level=training.empty_unused_memory_level,
    )


def _build_reporter(
    config: RunConfig,
    families: list[Family],
    progress: TrainingProgress,
    global_batch_size: int,
) -> Reporter:
    return Reporter(
        config.logging,
        total_iterations=config.training.resolved_train_iters(global_batch_size),
        charts=[chart for family in families for chart in family.charts],
        precision=config.training.precision,
        shows_batch_size=not config.training.has_constant_batch_size,
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        configuration=run_groups(config),
    )


def _begin(
    config: RunConfig, checkpointer: Checkpointer, stepper: Stepper, options: RunOptions
) -> TrainingProgress:
    """Loads the run's checkpoint, or begins a new run; returns the progress."""
    writes = not config.training.skip_train
    on_first_rank(lambda: check_directories(config.checkpoint, writes=writes))
    progress = checkpointer.load()
    if progress is None:
        options.begin(stepper.models, stepper.optimizer)
        progress = TrainingProgress(iteration=options.first_iteration, consumed_samples=options.first_sample)
    training = config.training
    in_steps = training.train_iters is not None and training.has_constant_batch_size
    if config.optimizer.override_opt_param_scheduler and in_steps:
        # The schedule counts samples. If the batch size has changed, --override-opt-param-scheduler moves the
        # schedule to the number of completed steps. With a ramp, the batch size follows from the samples.
        done = progress.iteration - options.first_iteration - progress.skipped_steps
        scheduler_state.move_to(stepper.scheduler, done * stepper.global_batch_size)
    return progress


def _flops_per_token(config: RunConfig, vocab_size: int, families: list[Family], iteration: int) -> float:
    tensor = config.parallel.tensor_model_parallel_size
    cost = run_cost(config.model, vocab_size, tensor, families, iteration)
    return training_flops_per_token(cost.parts.values())


def run_configuration(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the configuration that checkpoints store: config groups, vocabulary, and whether documents begin with
    BOS.
    """
    trained_on = (prefix for prefix in config.data.trained_on if not is_number(prefix))
    return {
        **run_groups(config),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        BEGIN: begin_of_documents(trained_on),
    }


def run_groups(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns the config groups as JSON values, without `data` if the caller supplies the batches."""
    has_data = config.data.trained_on or config.data.mock_data
    left_out = {"rehearsal"} if has_data else {"rehearsal", "data"}
    return {name: group for name, group in config_to_dict(config).items() if name not in left_out}
