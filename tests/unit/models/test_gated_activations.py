"""The gated activations equal their formulas in float64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.models.ops.gated_activations import geglu, swiglu

FORMULAS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "SwiGLU": (swiglu, F.silu),
    "GeGLU": (geglu, lambda gate: F.gelu(gate, approximate="tanh")),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_the_activation_and_its_gradient_are_those_of_the_formula(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    ours, activation = FORMULAS[name]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, 24, generator=generator).mul(2).to(dtype).requires_grad_()
    grad = torch.randn(5, 3, 12, generator=generator).to(dtype)
    exact = values.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = activation(gate) * up
    expected.backward(grad.double())
    output = ours(values)
    output.backward(grad)
    assert output.dtype == dtype
    assert values.grad is not None and exact.grad is not None
    for found, wanted in ((output, expected), (values.grad, exact.grad)):
        assert torch.linalg.norm(found.double() - wanted) <= tolerance * torch.linalg.norm(wanted)
