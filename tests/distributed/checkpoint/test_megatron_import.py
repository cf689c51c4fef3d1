"""Imports of checkpoints that megatron-core's own classes wrote in Megatron-LM's layout, and exports of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.interop.megatron.megatron_export import export_megatron
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


@pytest.mark.parametrize("name", with_marks(*CASES))
def test_an_import_equals_the_engines_model_and_an_export_gives_its_tensors(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    logits, losses = written(case, tmp_path / "theirs")
    found = imported(tmp_path / "theirs", tmp_path / "ours", with_optimizer=not case.release)
    assert (found.rows, found.tokenizer.vocab_size, found.messages) == (ROWS, VOCABULARY, ())
    torch.testing.assert_close(our_logits(tmp_path / "ours"), logits, rtol=0, atol=LOGITS[case.dtype])
    if not case.release:
        tolerance = LOSSES[case.dtype]
        assert our_losses(tmp_path / "ours", case) == pytest.approx(losses, rel=tolerance)
    alone(export_megatron, str(tmp_path / "ours"), tmp_path / "exported")
    again = imported(tmp_path / "exported", tmp_path / "again")
    assert (again.model, again.tokenizer.eod) == (found.model, VOCABULARY - 1)
    for tensor in found.state:
        if not tensor.startswith("optimizer."):
            assert torch.equal(again.state[tensor], found.state[tensor]), tensor


@pytest.mark.parametrize(
    "name", with_marks("Llama", "GPT-3", "query and key norms", "norms around 0", "windows")
)
def test_the_engines_model_loads_an_export(name: str, tmp_path: Path) -> None:
    logits, _ = written(CASES[name], tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    alone(export_megatron, str(tmp_path / "ours"), tmp_path / "exported")
    assert torch.equal(engines_logits(CASES[name], tmp_path / "exported" / "release"), logits)


def export(save: Path, target: Path) -> None:
    """Exports the newest checkpoint with its optimizer."""
    alone(lambda: export_megatron(str(save), target, with_optimizer=True))


@needs_te
@pytest.mark.parametrize("name", ["GPT-3", "norms around 0", "bf16", "fp16"])
def test_the_engines_training_continues_an_export_with_its_optimizer(name: str, tmp_path: Path) -> None:
    case, save = CASES[name], tmp_path / "ours"
    written(case, tmp_path / "theirs")
    imported(tmp_path / "theirs", save, with_optimizer=True)
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
