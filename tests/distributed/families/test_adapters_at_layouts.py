"""Adapted and four-bit linear layers at several parallel layouts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.lora.parallel_linear import LayerSettings
from megatron_ext.lora.trainable_layers import adapted_linears, merge_adapters
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.lora.test_peft_export import write_adapters
from tests.unit.progressive.progressive_helpers import (
    DUAL,
    MODEL,
    build,
    logits_of,
    some_tokens,
)

FOUR_BITS = {name: LayerSettings(precision=name, trains_base=False) for name in ("qlora", "nvfp4")}


def _unpacked(precision: str, layout: str, ffn_hidden_size: int) -> list[tuple[str, torch.Tensor]]:
    """This rank's parts of the stored weights; those of fc1 as [2, f/t, h]."""
    model = replace(MODEL, num_layers=1, hidden_size=128, ffn_hidden_size=ffn_hidden_size)
    found = []
    for _, name, linear in adapted_linears(build({0: FOUR_BITS[precision]}, LAYOUTS[layout], model=model)):
        weight = linear.read_weight(torch.float32)
        found.append((name, weight.view(2, -1, 128) if linear.is_gated else weight))
    return found


@pytest.mark.parametrize("precision", list(FOUR_BITS))
def test_weights_in_four_bits_do_not_depend_on_the_layout(precision: str) -> None:
    whole = run_single(_unpacked, precision, "TP1", 256)
    parts = run_distributed(_unpacked, 2, precision, "TP2", 256)
    for place, (name, expected) in enumerate(whole):
        split = next(dim for dim, size in enumerate(expected.shape) if parts[0][place][1].shape[dim] != size)
        assert torch.cat([rank[place][1] for rank in parts], dim=split).equal(expected), name


def test_a_layout_through_a_block_is_refused() -> None:
    message = (
        "precision qlora: tensor parallelism would split blocks of 64 weights, because the matrix has 96"
    )
    with pytest.raises(RuntimeError, match=message):
        run_distributed(_unpacked, 2, "qlora", "TP2", 192)


def _pass(chunk: GPTModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = some_tokens()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    losses = chunk(tokens, positions, None, labels=tokens.roll(-1, 1))
    losses.mean().backward()
    gradients = {n: p.grad for n, p in chunk.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def _empty_and_plain(parallel: ParallelConfig, biased: bool) -> bool:
    model = replace(MODEL, add_qkv_bias=True, add_attention_output_bias=True, add_mlp_bias=True)
    model = model if biased else MODEL
    empty = dict.fromkeys(range(4), LayerSettings())
    losses, gradients = _pass(build({}, parallel, model=model)[0])
    empty_losses, empty_gradients = _pass(build(empty, parallel, model=model)[0])
    same = [gradients[name].equal(empty_gradients[name]) for name in gradients]
    return losses.equal(empty_losses) and gradients.keys() == empty_gradients.keys() and all(same)


@pytest.mark.parametrize(("layout", "biased"), [("TP1", False), ("TP2", True), ("TP2+SP", False)])
def test_without_adapters_losses_and_gradients_are_the_engines_to_the_bit(layout: str, biased: bool) -> None:
    assert all(run_distributed(_empty_and_plain, 1 if layout == "TP1" else 2, LAYOUTS[layout], biased))


WIDE = replace(MODEL, hidden_size=128, ffn_hidden_size=128)
"""Of which a half is a multiple of NF4's block."""


def _merged(parallel: ParallelConfig, precision: str | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    settings = replace(DUAL, precision=precision)  # type: ignore[arg-type]
    chunks = build(dict.fromkeys(range(4), settings), parallel, model=WIDE)
    before = logits_of(chunks[0])
    merge_adapters(chunks)
    assert {p.dtype for p in chunks[0].parameters()} == {torch.float32}
    left = sum(".adapters." in name for name, _ in chunks[0].named_parameters())
    return before, logits_of(chunks[0]), left


@pytest.mark.parametrize("precision", [None, "qlora"])
def test_a_merged_model_computes_what_the_adapted_one_did(precision: str | None) -> None:
    ranks, single = (run_distributed(_merged, size, LAYOUTS[f"TP{size}"], precision) for size in (2, 1))
    for before, after, left in (*ranks, *single):
        assert left == 0
        assert float((before - after).abs().max()) < 3e-6 * float(before.abs().max())
    whole = torch.cat([after for _, after, _ in ranks], dim=-1)
    torch.testing.assert_close(whole, single[0][1], rtol=1e-5, atol=2e-5)


def test_a_layout_model_writes_the_same_files(tmp_path: Path) -> None:
    plan = "ranks and layers differ"
    whole, layout = tmp_path / "whole", tmp_path / "layout"
    for folder, size, parallel in ((whole, 1, ParallelConfig()), (layout, 4, LAYOUTS["TP2xPP2"])):
        folder.mkdir()
        run_distributed(write_adapters, size, str(folder), plan, parallel)
    for name in DUAL.adapters:
        first, second = ((side / name / "adapter_model.safetensors").read_bytes() for side in (whole, layout))
        assert first == second
