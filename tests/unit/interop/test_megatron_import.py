"""Imports of checkpoints that megatron-core's own classes wrote, in Megatron-LM's layout, in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.inference.load_model import load_model
from megatron_ext.interop.megatron.megatron_import import import_megatron
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from tests.unit.interop.hf_models import alone
from tests.unit.interop.megatron_checkpoints import CASES, LENGTH, ROWS, STEPS, VOCABULARY, Case, Run, token_ids


def written(case: Case, folder: Path, sharding: str | None = None) -> tuple[torch.Tensor, list[float]]:
    """Trains a case, saves it, and returns its logits and the losses of the steps after the save."""

    def run() -> tuple[torch.Tensor, list[float]]:
        trained = Run(case, ParallelConfig(use_distributed_optimizer=sharding is not None), sharding)
        trained.train(STEPS)
        trained.save(folder, STEPS)
        logits = trained.logits()
        trained.chunks[0].train()
        return logits, trained.train(2)

    result: tuple[torch.Tensor, list[float]] = run_single(run)
    return result


def imported(source: Path, save: Path, **options: Any) -> Any:
    """Imports a checkpoint, in a process group of its own."""
    return alone(lambda: import_megatron(source, save, **options))


def our_logits(save: Path) -> torch.Tensor:
    """Returns the logits of an imported checkpoint."""

    def run() -> torch.Tensor:
        model, tokens = load_model(str(save), {}).model.eval(), token_ids()
        with torch.no_grad():
            logits: torch.Tensor = model(tokens, torch.arange(LENGTH).expand_as(tokens), None).float()
        return logits

    result: torch.Tensor = alone(run)
    return result


def our_losses(save: Path, bf16: bool) -> list[float]:
    """Resumes an imported run, and returns the losses of two steps."""
    stored = read_run_config(str(save))
    settings = RunSettings(
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(load=str(save)),
        model=group_in(ModelConfig, stored, "model"),
        bf16=bf16,
        vocab_size=stored["vocab_size"],
        tokenizer=stored["tokenizer_fingerprint"],
    )

    def run() -> list[float]:
        resumed = TinyRun(settings)
        assert resumed.progress.iteration == STEPS
        return resumed.train(2)

    losses: list[float] = run_single(run)
    return losses


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_engines_own_and_the_next_steps_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    logits, losses = written(case, tmp_path / "theirs")
    found = imported(tmp_path / "theirs", tmp_path / "ours", with_optimizer=not case.release)
    assert (found.rows, found.tokenizer.vocab_size, found.messages) == (ROWS, VOCABULARY, ())
    torch.testing.assert_close(
        our_logits(tmp_path / "ours"), logits, rtol=0, atol=0.05 if case.bf16 else 1e-5
    )
    if not case.release:
        tolerance = 2e-2 if case.bf16 else 1e-6
        print(our_losses(tmp_path / "ours", case.bf16), losses)
        assert our_losses(tmp_path / "ours", case.bf16) == pytest.approx(losses, rel=tolerance)
