"""Sparse gated activations are those of Gemma 3n in transformers, forward and backward, and cut off the given share."""

from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.gemma3n.sparse_activations import SparseGatedActivation
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

Results = list[tuple[torch.Tensor, torch.Tensor]]


def _both(dtype: torch.dtype, sparsity: float, has_gelu: bool) -> Results:
    """(ours, transformers' in fp64) of the output and of the input's gradient."""
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    initialize(ParallelConfig(), seed=1)
    config: Any = Gemma3nTextConfig(
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=64,
        num_hidden_layers=1,
        activation_sparsity_pattern=[sparsity],
        layer_types=["full_attention"],
        num_kv_shared_layers=0,
        hidden_activation="gelu_pytorch_tanh" if has_gelu else "silu",
    )
    theirs: Any = Gemma3nTextMLP(config).double()
    values = torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(0)).mul(2).add(0.3)
    direction = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    ours_in = values.to(dtype).requires_grad_()
    ours = SparseGatedActivation(config, sparsity=sparsity, has_gelu=has_gelu)(ours_in)
    ours.backward(direction.to(dtype))
    exact = ours_in.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = theirs.act_fn(theirs._gaussian_topk(gate)) * up
    expected.backward(direction.to(dtype).double())
    assert ours_in.grad is not None and exact.grad is not None
    return [(ours.detach(), expected.detach()), (ours_in.grad, exact.grad)]


@pytest.mark.parametrize("has_gelu", [True, False], ids=["GeGLU", "SwiGLU"])
@pytest.mark.parametrize("sparsity", [0.95, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradient_are_those_of_transformers(
    dtype: torch.dtype, tolerance: float, sparsity: float, has_gelu: bool
) -> None:
    for found, expected in run_single(_both, dtype, sparsity, has_gelu):
        assert found.dtype == dtype
        assert torch.linalg.norm(found.double() - expected) <= tolerance * torch.linalg.norm(expected)


def test_the_share_of_normal_gates_that_is_cut_off_is_the_given_one() -> None:
    share, gradient = run_single(_cut_off)
    assert share == pytest.approx(0.9, abs=0.005)
    assert gradient.isfinite().all()


def _cut_off() -> tuple[float, torch.Tensor]:
    initialize(ParallelConfig(), seed=1)
    activation = SparseGatedActivation(None, sparsity=0.9, has_gelu=True)
    values = torch.randn(64, 1, 2048, generator=torch.Generator().manual_seed(0)).mul(3).sub(1)
    output = activation(values)
    equal = torch.zeros(1, 1, 8, requires_grad=True)  # gates without any deviation
    activation(equal).sum().backward()
    assert equal.grad is not None
    return float((output == 0).float().mean()), equal.grad
