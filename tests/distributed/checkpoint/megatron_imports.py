"""Imports a Megatron-LM checkpoint in a process group of its own, and runs the imported model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.inference.load_model import load_model
from megatron_ext.interop.megatron.megatron_import import MegatronModel, import_megatron
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import clean_process, run_single
from megatron_ext.testing.transformer_engine.run_with_te import run_with_te
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from tests.distributed.checkpoint.megatron_checkpoints import LENGTH, STEPS, Case, Run, token_ids


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that starts and ends a process group of its own."""
    with clean_process():
        return function(*args)


def written(case: Case, folder: Path, sharding: str | None = None) -> tuple[torch.Tensor, list[float]]:
    """Trains a case, saves it, and returns its logits and the losses of the two steps after the save."""
    if case.needs_te:
        result: tuple[torch.Tensor, list[float]] = run_with_te(_write, 1, case, folder, sharding)[0]
    else:
        result = run_single(_write, case, folder, sharding)
    return result


def _write(case: Case, folder: Path, sharding: str | None) -> tuple[torch.Tensor, list[float]]:
    trained = Run(case, ParallelConfig(use_distributed_optimizer=sharding is not None), sharding)
    trained.train(STEPS)
    trained.save(folder, STEPS)
    logits = trained.logits()
    trained.chunks[0].train()
    return logits, trained.train(2)


def engines_logits(case: Case, folder: Path) -> torch.Tensor:
    """Loads a checkpoint into the engine's model, with the engine's reader, and returns its logits."""
    if case.needs_te:
        logits: torch.Tensor = run_with_te(_load, 1, case, folder)[0]
    else:
        logits = run_single(_load, case, folder)
    return logits


def _load(case: Case, folder: Path) -> torch.Tensor:
    run = Run(case, ParallelConfig())
    run.load(folder)
    return run.logits()


def imported(source: Path, save: Path, **options: Any) -> MegatronModel:
    """Imports a checkpoint."""
    found: MegatronModel = alone(lambda: import_megatron(source, save, **options))
    return found


def our_logits(save: Path) -> torch.Tensor:
    """Returns the logits of an imported checkpoint for `token_ids`."""

    def run() -> torch.Tensor:
        model, tokens = load_model(str(save), {}).model.eval(), token_ids()
        with torch.no_grad():
            logits: torch.Tensor = model(tokens, torch.arange(LENGTH).expand_as(tokens), None).float()
        return logits

    result: torch.Tensor = alone(run)
    return result


def resumed(save: Path, case: Case) -> TinyRun:
    """Resumes an imported run, in a process group; it saves to the same directory."""
    stored = read_run_config(str(save))
    run = TinyRun(
        RunSettings(
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(load=str(save), save=str(save)),
            model=group_in(ModelConfig, stored, "model"),
            precision=case.precision,
            vocab_size=stored["vocab_size"],
            tokenizer=stored["tokenizer_fingerprint"],
            tokenizer_config=group_in(TokenizerConfig, stored, "tokenizer"),
        )
    )
    assert run.progress.iteration == STEPS
    return run


def our_losses(save: Path, case: Case) -> list[float]:
    """Resumes an imported run after `STEPS` steps, and returns the losses of two more."""
    losses: list[float] = run_single(lambda: resumed(save, case).train(2))
    return losses


def engines_losses(case: Case, folder: Path) -> list[float]:
    """Continues a checkpoint with the engine's model on Transformer Engine and its distributed optimizer, two steps."""
    losses: list[float] = run_with_te(_continue, 1, replace(case, needs_te=True), folder)[0]
    return losses


def _continue(case: Case, folder: Path) -> list[float]:
    run = Run(case, ParallelConfig(use_distributed_optimizer=True), "fully_reshardable")
    run.resume(folder)
    return run.train(2)
