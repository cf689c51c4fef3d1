"""RMSNorm and LayerNorm equal torch's in float64, forward and backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.models.ops.norm import LayerNorm, Norm, RMSNorm

HIDDEN = 24
EPS = 1e-3
"""Large, so that a forgotten or misplaced epsilon shows."""


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def build(kind: str, dtype: torch.dtype, *, zero_centered: bool = False) -> Any:
    """A norm with random weights."""
    config: Any = SimpleNamespace(
        params_dtype=dtype,
        sequence_parallel=False,
        normalization=kind,
        layernorm_zero_centered_gamma=zero_centered,
    )
    norm = Norm(config, HIDDEN, EPS)
    assert isinstance(norm, RMSNorm if kind == "RMSNorm" else LayerNorm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(HIDDEN, generator=generator))
    return norm


def reference(kind: str, norm: Any, values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """torch's own norm in float64 on the same values; and the parameters it used."""
    parameters = [p.detach().double().requires_grad_() for p in norm.parameters()]
    if kind == "RMSNorm":
        return F.rms_norm(values, (HIDDEN,), parameters[0], EPS), parameters
    return F.layer_norm(values, (HIDDEN,), parameters[0], parameters[1], EPS), parameters


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("layout", ["contiguous", "permuted input", "permuted gradient", "expanded gradient"])
def test_norm_equals_torch_in_float64_forward_and_backward(
    kind: str, dtype: torch.dtype, tolerance: float, layout: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(5, 3, HIDDEN, generator=generator) * 3).to(dtype)
    grad = torch.randn(5, 3, HIDDEN, generator=generator).to(dtype)
    if layout == "permuted input":
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "permuted gradient":
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded gradient":
        grad = torch.ones((), dtype=dtype).expand_as(values)
    norm, exact_values = build(kind, dtype), values.detach().double().requires_grad_()
    values.requires_grad_()

    output = norm(values)
    output.backward(grad)
    expected, parameters = reference(kind, norm, exact_values)
    expected.backward(grad.double())

    assert output.dtype == values.grad.dtype == dtype  # type: ignore[union-attr]
    assert_close(output, expected, tolerance)
    assert_close(values.grad, exact_values.grad, tolerance)
    for found, wanted in zip(norm.parameters(), parameters, strict=True):
        assert_close(found.grad, wanted.grad, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=["same residual", "fp32 residual"])
def test_a_residual_stream_plus_an_rms_norm_equals_float64_forward_and_backward(
    dtype: torch.dtype, tolerance: float, residual_dtype: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    residual, values, grad = (torch.randn(5, 3, HIDDEN, generator=generator) * 3 for _ in range(3))
    inputs = [residual.to(residual_dtype or dtype), values.to(dtype)]
    norm, exact = build("RMSNorm", dtype), [each.double().requires_grad_() for each in inputs]
    for each in inputs:
        each.requires_grad_()

    output = norm(inputs[1], residual=inputs[0])
    output.backward(grad.to(output.dtype))
    normed, (weight,) = reference("RMSNorm", norm, exact[1])
    expected = exact[0] + normed
    expected.backward(grad.to(output.dtype).double())

    assert output.dtype == inputs[0].dtype
    assert_close(output, expected, tolerance)
    for found, wanted in zip((*inputs, norm.weight), (*exact, weight), strict=True):
        assert_close(found.grad, wanted.grad, tolerance)


def assert_close(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    """Relative to the largest value."""
    assert found is not None and expected is not None
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_norms_mark_their_parameters_for_sequence_parallelism() -> None:
    config: Any = SimpleNamespace(
        params_dtype=torch.float32, sequence_parallel=True, layernorm_zero_centered_gamma=False
    )
    for norm in (RMSNorm(config, HIDDEN), LayerNorm(config, HIDDEN)):
        assert all(vars(parameter)["sequence_parallel"] for parameter in norm.parameters())


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_zero_centered_weight_is_the_difference_from_one_and_keeps_its_bits(
    kind: str, dtype: torch.dtype
) -> None:
    norm = build(kind, dtype, zero_centered=True)
    assert not type(norm)(norm_config(kind), HIDDEN).weight.any()
    values = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = (norm.weight.double() + 1).detach().requires_grad_()
    exact = values.double()
    if kind == "RMSNorm":
        expected = F.rms_norm(exact, (HIDDEN,), weight, EPS)
    else:
        expected = F.layer_norm(exact, (HIDDEN,), weight, norm.bias.double(), EPS)
    output = norm(values)
    output.sum().backward()
    expected.sum().backward()
    # In bf16 only the result is rounded: 1 + weight in bf16 would be off by twice as much.
    assert (output.double() - expected).abs().max() <= expected.abs().max() * (
        2e-6 if dtype == torch.float32 else 2**-9
    )
    assert_close(norm.weight.grad, weight.grad, 2e-6 if dtype == torch.float32 else 2**-7)


def norm_config(kind: str) -> Any:
    return SimpleNamespace(
        params_dtype=torch.float32,
        sequence_parallel=False,
        normalization=kind,
        layernorm_zero_centered_gamma=True,
    )
