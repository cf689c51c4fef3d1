"""Imports of checkpoints that megatron-core's own classes wrote in Megatron-LM's layout, and exports of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.interop.megatron.megatron_export import export_megatron
from megatron_ext.testing.transformer_engine.run_with_te import needs_te
from tests.distributed.checkpoint.megatron_checkpoints import CASES, ROWS, VOCABULARY
from tests.distributed.checkpoint.megatron_imports import (
    alone,
    engines_logits,
    imported,
    our_logits,
    our_losses,
    written,
)


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
    torch.testing.assert_close(
        our_logits(tmp_path / "ours"), logits, rtol=0, atol=0.05 if case.bf16 else 1e-5
    )
    if not case.release:
        tolerance = 1e-3 if case.bf16 else 1e-6
        assert our_losses(tmp_path / "ours", case.bf16) == pytest.approx(losses, rel=tolerance)
    alone(export_megatron, str(tmp_path / "ours"), tmp_path / "exported")
    again = imported(tmp_path / "exported", tmp_path / "again")
    assert again.model == found.model
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
