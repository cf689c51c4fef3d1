"""Memory of the factored and the materialised form, and that both are the same function."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.evaluation.delta_memory import SizeMemory, TokenBytes, measure_memory, project_memory
from megatron_ext.npt.modules.materialised_deltas import materialised_mlp
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform.allocations import AllocationCounter
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from tools.memory_report import main

GATE = NPTModuleConfig(npt_layers="all", np_rank=4)
TRIPLE = replace(GATE, np_target="triple", np_init_scale=0.5, num_np_components=2)
OUTER = replace(TRIPLE, np_form="outer_product")
KEY_VALUE = replace(TRIPLE, np_form="key_value", num_np_components=1, np_scale=0.7)


def _counted() -> list[tuple[int, int]]:
    x = torch.ones(250, requires_grad=True)
    with AllocationCounter() as counter:
        y = x * 2
        seen = [(counter.current, counter.peak)]
        z = (y * y).view(10, 25)[1:]
        seen.append((counter.current, counter.peak))
        del y
        z.sum().backward()
        del z
        seen.append((counter.current, counter.peak))
        x.grad = None
        seen.append((counter.current, counter.peak))
    return seen


def test_allocations_are_counted_from_their_making_to_their_end() -> None:
    first, second, after_backward, end = _counted()
    assert first == (1000, 1000)
    assert second == (2000, 2000)  # a view is nothing new
    assert after_backward[0] == 1000  # the gradient
    assert after_backward[1] > 2000
    assert end[0] == 0


def _difference() -> dict[str, float]:
    """Largest relative difference of output and gradients between the forms."""
    initialize(ParallelConfig(), seed=3)
    found = {}
    bare = replace(OUTER, np_affine=False, np_normalize=False)
    cases = [(settings, "RMSNorm") for settings in (TRIPLE, OUTER, bare, KEY_VALUE)]
    cases += [(replace(TRIPLE, np_target="fc1"), "RMSNorm"), (replace(OUTER, np_target="gate"), "RMSNorm")]
    for target in ("gate+up", "fc1", "gate+up+down"):
        cases.append((replace(KEY_VALUE, np_target=target), "LayerNorm"))
    for settings, norm in cases:
        model = ModelConfig(
            num_layers=1,
            hidden_size=16,
            ffn_hidden_size=24,
            num_attention_heads=2,
            seq_length=8,
            swiglu=settings.np_target != "fc1",
            init_method_std=0.3,
            normalization=norm,  # type: ignore[arg-type]
        )
        extensions: list[Any] = [NPTExtension(settings)]
        layer: Any = build_model(model, ParallelConfig(), vocab_size=32, seed=3, extensions=extensions)[
            0
        ].decoder.layers[0]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layer.pre_mlp_layernorm.parameters():
                parameter.normal_(1.0, 0.3, generator=generator)
        inputs = [torch.randn(3, 2, 16, generator=generator).requires_grad_() for _ in range(2)]
        wanted = [*inputs, *layer.mlp.parameters(), *layer.feed_forward.parameters()]
        results = []
        for output in (
            layer.feed_forward.mlp_output(layer, *inputs),
            materialised_mlp(layer.feed_forward, layer, *inputs),
        ):
            loss = (output * output.detach().cos()).sum()
            results.append([output, *torch.autograd.grad(loss, wanted)])
        found[f"{norm} {settings}"] = max(
            float(((a - b).norm() / (b.norm() + 1e-30)).detach()) for a, b in zip(*results, strict=True)
        )
    return found


def test_the_materialised_form_is_the_same_function_with_the_same_gradients() -> None:
    for settings, difference in run_single(_difference).items():
        assert difference < 2e-5, settings


def _measured() -> list[SizeMemory]:
    initialize(ParallelConfig(), seed=3)
    return [measure_memory(GATE, size, 2 * size) for size in (32, 64, 128)]


def test_materialised_memory_is_the_deltas_and_their_gradients_and_factored_memory_is_r_sized() -> None:
    small, middle, large = run_single(_measured)
    for size in (small, middle, large):
        delta = 4 * size.hidden_size * size.ffn_hidden_size
        assert delta <= size.materialised.kept < 1.3 * delta
        assert 2 * delta <= size.materialised.peak < 2.5 * delta
        assert size.factored.kept == 4 * 3 * GATE.np_rank  # x A, tanh(a A) and u
    projected = project_memory([small, middle], 128, 256)
    assert projected.factored.kept == pytest.approx(large.factored.kept)
    assert projected.materialised.kept == pytest.approx(large.materialised.kept, rel=0.05)
    assert projected.materialised.peak == pytest.approx(large.materialised.peak, rel=0.05)


def test_layers_keep_at_once_and_reach_their_peaks_one_after_the_other() -> None:
    assert TokenBytes(kept=10, peak=25).of(tokens=3, layers=4) == 3 * (40 + 15)


def _tool(arguments: list[str]) -> None:
    sys.argv = ["memory_report.py", *arguments]
    main()


def test_the_tool_writes_what_it_measured_and_the_projection(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    run_single(_tool, ["--sizes", "32,64", "--np-rank", "4", "--output", str(output)])
    report = json.loads(output.read_text())
    assert [size["hidden_size"] for size in report["measured"]] == [32, 64]
    assert report["projected"]["hidden_size"] == 4096
    materialised, factored = (report["micro_batch_bytes"][form] for form in ("materialised", "factored"))
    assert materialised["1"] > 2**40 and factored["16"] < 2**30
