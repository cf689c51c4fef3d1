"""Imports of checkpoints that megatron-core's own classes wrote in Megatron-LM's layout, and exports of them."""

from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop.megatron.megatron_export import export_megatron
from megatron_ext.testing.run_single import run_single
from tests.distributed.checkpoint.megatron_checkpoints import CASES, ROWS, VOCABULARY, Run
from tests.distributed.checkpoint.megatron_imports import alone, imported, our_logits, our_losses, written


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", ["Llama", "GPT-3", "query and key norms"])
def test_the_engines_model_loads_an_export(name: str, tmp_path: Path) -> None:
    logits, _ = written(CASES[name], tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    alone(export_megatron, str(tmp_path / "ours"), tmp_path / "exported")

    def loaded() -> torch.Tensor:
        run = Run(CASES[name], ParallelConfig())
        run.load(tmp_path / "exported" / "release")
        return run.logits()

    assert torch.equal(run_single(loaded), logits)
