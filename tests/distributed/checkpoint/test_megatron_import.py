"""Imports of checkpoints that megatron-core's own classes wrote in Megatron-LM's layout, and exports of them."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.interop.megatron.megatron_export import export_megatron
from megatron_ext.interop.megatron.megatron_import import MegatronModel
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.transformer_engine.run_with_te import needs_te
from tests.distributed.checkpoint.megatron_checkpoints import CASES, ROWS, STEPS, VOCABULARY
from tests.distributed.checkpoint.megatron_imports import (
    alone,
    engines_logits,
    engines_losses,
    imported,
    our_logits,
    our_losses,
    resumed,
    written,
)

LOGITS = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
LOSSES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Tolerances of an import, by type of the weights."""


def with_marks(*names: str) -> list[Any]:
    """Returns the cases' names as parameters; those that need Transformer Engine's Python say so."""
    return [pytest.param(name, marks=needs_te) if CASES[name].needs_te else name for name in names]


@dataclass(frozen=True)
class Imported:
    """A checkpoint of the engine's, its import and the import's export."""

    logits: torch.Tensor
    losses: list[float]
    """Of the two steps that the engine does after the save."""

    model: MegatronModel
    save: Path
    """The import, with its optimizer unless the checkpoint has none."""

    exported: Path
    """The export, without an optimizer."""


@pytest.fixture(scope="module")
def import_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Imported]:
    """Returns the import of a case by its name, made once for all tests."""

    @functools.cache
    def make(name: str) -> Imported:
        case, folder = CASES[name], tmp_path_factory.mktemp("import")
        save, exported = folder / "ours", folder / "exported"
        logits, losses = written(case, folder / "theirs")
        model = imported(folder / "theirs", save, with_optimizer=not case.release)
        alone(export_megatron, str(save), exported)
        return Imported(logits, losses, model, save, exported)

    return make


@pytest.mark.parametrize("name", with_marks(*CASES))
def test_an_import_equals_the_engines_model_and_an_export_gives_its_tensors(
    name: str, import_of: Callable[[str], Imported], tmp_path: Path
) -> None:
    case, theirs = CASES[name], import_of(name)
    found = theirs.model
    assert (found.rows, found.tokenizer.vocab_size, found.messages) == (ROWS, VOCABULARY, ())
    torch.testing.assert_close(our_logits(theirs.save), theirs.logits, rtol=0, atol=LOGITS[case.dtype])
    if not case.release:
        tolerance = LOSSES[case.dtype]
        assert our_losses(theirs.save, case) == pytest.approx(theirs.losses, rel=tolerance)
    again = imported(theirs.exported, tmp_path / "again")
    assert (again.model, again.tokenizer.eod) == (found.model, VOCABULARY - 1)
    for tensor in found.state:
        if not tensor.startswith("optimizer."):
            assert torch.equal(again.state[tensor], found.state[tensor]), tensor


@pytest.mark.parametrize(
    "name", with_marks("Llama", "GPT-3", "query and key norms", "norms around 0", "windows")
)
def test_the_engines_model_loads_an_export(name: str, import_of: Callable[[str], Imported]) -> None:
    theirs = import_of(name)
    assert torch.equal(engines_logits(CASES[name], theirs.exported / "release"), theirs.logits)


def export(save: Path, target: Path) -> None:
    """Exports the newest checkpoint with its optimizer."""
    alone(lambda: export_megatron(str(save), target, with_optimizer=True))


@needs_te
@pytest.mark.parametrize("name", ["GPT-3", "norms around 0", "bf16", "fp16"])
def test_the_engines_training_continues_an_export_with_its_optimizer(
    name: str, import_of: Callable[[str], Imported], tmp_path: Path
) -> None:
    case, save = CASES[name], tmp_path / "ours"
    shutil.copytree(import_of(name).save, save)
    export(save, tmp_path / "at once")

    def ours() -> tuple[list[float], list[float | None]]:
        run = resumed(save, case)
        run.train(1)
        run.save()
        return run.train(2), run.loss_scales

    losses, scales = run_single(ours)
    # Adam's constants and the schedule are the import's, or those of the run here.
    export(save, tmp_path / "later")
    tolerance = 1e-6 if case.dtype == torch.float32 else 2e-2
    continued = engines_losses(case, tmp_path / "later" / f"iter_{STEPS + 1:07d}")
    assert continued == pytest.approx(losses, rel=tolerance)
    assert engines_losses(case, tmp_path / "at once" / f"iter_{STEPS:07d}")[1:] == pytest.approx(
        losses[:1], rel=tolerance
    )
    assert (scales[0] == 2.0**7) is (name == "fp16")
    again = imported(tmp_path / "later", tmp_path / "again", with_optimizer=True)
    assert again.progress is not None
    assert again.progress.optimizer_step == STEPS + 1
