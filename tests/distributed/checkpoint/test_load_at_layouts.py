"""A checkpoint's model is rebuilt at another parallel layout."""

from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpointer import load_weights, read_run_config
from tests.unit.training.test_checkpoint_load import save_two_steps


def _logits(folder: str, parallel: ParallelConfig) -> torch.Tensor:
    stored = read_run_config(folder)
    initialize(parallel, seed=5)
    model = group_in(ModelConfig, stored, "model")
    chunks = build_model(model, parallel, vocab_size=stored["vocab_size"], seed=5)
    load_weights(folder, list(chunks), [])
    assert len(chunks) == 1
    tokens = torch.arange(model.seq_length).unsqueeze(0)
    with torch.no_grad():
        logits = chunks[0].eval()(tokens, tokens, None)
    parts = [torch.empty_like(logits) for _ in range(parallel.tensor_model_parallel_size)]
    torch.distributed.all_gather(parts, logits, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def test_tools_rebuild_the_model_from_the_checkpoint_at_any_parallel_layout(tmp_path: Path) -> None:
    saved = str(tmp_path)
    run_single(save_two_steps, saved)
    expected = run_single(_logits, saved, ParallelConfig())
    assert expected.abs().max() > 0.1
    for found in run_distributed(_logits, 2, saved, ParallelConfig(tensor_model_parallel_size=2)):
        torch.testing.assert_close(found, expected)
