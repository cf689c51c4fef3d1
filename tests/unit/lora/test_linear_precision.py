"""Four-bit weights against their definition, and layers of each precision against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.lora.four_bit_weights import Part, _load, check_part, packing
from megatron_ext.lora.linear_precision import mixed_linear
from megatron_ext.lora.parallel_linear import LayerSettings
from megatron_ext.lora.trainable_layers import adapted_linears, weight_bytes
from megatron_ext.testing.run_single import run_single
from tests.unit.progressive.progressive_helpers import DUAL, MODEL, build, some_tokens

NF4_CODES = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]
"""The 16 values of arXiv 2305.14314, appendix E."""

E2M1_CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = [(64, 64), (64, 32), (96, 48), (10, 16), (33, 160)]


def _weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_of_16_values_times_the_largest_of_64(shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    flat = weight.flatten().double()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4_CODES, dtype=torch.float64)
    nearest = ((blocks / largest).unsqueeze(-1) - codes).abs().argmin(-1)
    expected = (codes[nearest] * largest).flatten()[: flat.numel()].view(shape)
    form = packing("qlora")
    found = form.unpack(form.pack(weight), weight.shape, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_is_the_nearest_four_bit_float_times_scales_of_8_bits(shape: tuple[int, int]) -> None:
    weight = _weight(shape)
    form = packing("nvfp4")
    found = form.unpack(form.pack(weight), weight.shape, torch.float32).double().view(-1, 16)
    blocks = weight.double().view(-1, 16)
    codes = torch.tensor([*E2M1_CODES, *(-c for c in E2M1_CODES[1:])], dtype=torch.float64)
    whole = 2.0 ** torch.ceil(torch.log2(weight.abs().max().double() / 6 / 448))
    scales = (blocks.abs().amax(1, keepdim=True) / 6 / whole).float().to(torch.float8_e4m3fn).double() * whole
    distance = ((blocks / scales).unsqueeze(-1) - codes).abs().amin(-1)
    torch.testing.assert_close((found - blocks).abs(), distance * scales, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("precision", "error"), [("qlora", 0.10), ("nvfp4", 0.11)])
def test_four_bits_cost_a_tenth_of_the_norm_and_packing_again_costs_nothing(
    precision: str, error: float
) -> None:
    form = packing(precision)
    for seed, shape in enumerate(SHAPES * 4):
        weight = _weight(shape, seed) * 10.0 ** (seed % 5 - 2)
        packed = form.pack(weight)
        found = form.unpack(packed, weight.shape, torch.float32)
        assert float((found - weight).norm()) < error * float(weight.norm())
        again = form.unpack(form.pack(found), weight.shape, torch.float32)
        assert torch.equal(again, found)
        assert packed.codes.numel() * 2 == weight.numel()


@pytest.mark.parametrize("precision", ["qlora", "nvfp4"])
def test_a_matrix_of_zeros_stays_zero(precision: str) -> None:
    form = packing(precision)
    zeros = torch.zeros(32, 64)
    assert torch.equal(form.unpack(form.pack(zeros), zeros.shape, torch.float32), zeros)


def test_a_missing_library_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^precision qlora requires nothing_such, which cannot be imported"
    ) as e:
        _load("nothing_such.functional", "qlora", "nothing_such")
    assert "\n" not in str(e.value) and "pip install 'megatron-ext[quantization]'" in str(e.value)


def test_nvfp4_refuses_a_row_that_16_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"^precision nvfp4: .* must be a multiple of 16, but it is 24$"):
        check_part("nvfp4", Part(rows=8, row=24, splits_input=False), 1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_a_product_in_another_precision_has_right_gradients_however_small(
    dtype: torch.dtype, tolerance: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 3, 32, generator=generator), torch.randn(24, 32, generator=generator)
    grad = size * torch.randn(6, 3, 24, generator=generator)
    x.requires_grad_()
    weight.requires_grad_()
    y = mixed_linear(x, weight, lambda kind: weight.detach().to(kind), dtype)
    y.backward(grad)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = exact_x @ exact_weight.t()
    exact.backward(grad.double())
    for ours, theirs in (
        (y.detach(), exact.detach()),
        (x.grad, exact_x.grad),
        (weight.grad, exact_weight.grad),
    ):
        assert ours is not None and theirs is not None and ours.dtype == torch.float32
        assert float((ours.double() - theirs).norm()) < tolerance * float(theirs.norm())


def test_a_gradient_of_zeros_stays_zero_and_one_that_is_not_finite_stays_so() -> None:
    x = torch.randn(2, 2, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    for value in (0.0, float("nan"), float("inf")):
        (found,) = torch.autograd.grad(
            mixed_linear(x, weight, weight.to, torch.float16), x, torch.full((2, 2, 3), value)
        )
        assert bool((found == 0).all()) if value == 0.0 else not bool(found.isfinite().any())


WIDE = replace(MODEL, hidden_size=128, ffn_hidden_size=192)


def _layers(bf16: bool) -> tuple[dict[int, int], list[tuple[str, float, float, bool]]]:
    """Bytes by layer, and each linear layer's error of output and input gradient against its own weights."""
    names: list[Any] = ["qlora", "nvfp4", "half", "bfloat16"]
    plan = {i: LayerSettings(precision=name, trains_base=False) for i, name in enumerate(names)}
    chunks = build(plan, model=WIDE, precision="bf16" if bf16 else "fp32")
    found = []
    for number, _, linear in adapted_linears(chunks):
        dtype = torch.bfloat16 if bf16 else torch.float32
        x = torch.randn(5, 2, linear.weight_shape[1]).to(dtype).requires_grad_()
        y = linear(x)[0]
        grad = torch.randn_like(y)
        y.backward(grad)
        weight = linear.read_weight(torch.float64 if number > 1 else torch.float32).detach().double()
        assert x.grad is not None
        exact, exact_grad = x.detach().double() @ weight.t(), grad.double() @ weight
        errors = [
            float((ours.double() - theirs).norm() / theirs.norm())
            for ours, theirs in ((y.detach(), exact), (x.grad, exact_grad))
        ]
        found.append((names[number], *errors, linear.weight.grad is not None))
    return weight_bytes(chunks), found


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stored_layer_computes_with_its_stored_weights_and_gives_them_no_gradient(bf16: bool) -> None:
    _, layers = run_single(_layers, bf16)
    tolerance = {"qlora": 1e-6, "nvfp4": 1e-6, "half": 1e-3, "bfloat16": 8e-3}
    for name, error, grad_error, has_gradient in layers:
        allowed = max(tolerance[name], 8e-3 if bf16 else 0.0)
        assert error < allowed and grad_error < allowed and not has_gradient, name


def test_a_layer_in_four_bits_takes_less_than_three_tenths_of_one_in_bf16() -> None:
    found, _ = run_single(_layers, True)
    qlora, nvfp4, half, bfloat16 = (found[layer] for layer in range(4))
    weights = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 192
    norms = 2 * 128 * 2
    assert bfloat16 == half == 2 * weights + norms
    assert qlora == weights // 2 + 4 * weights // 64 + norms
    assert nvfp4 == weights // 2 + weights // 16 + 4 * 4 + norms
    assert max(qlora, nvfp4) < 0.3 * bfloat16


def test_a_layer_in_full_precision_keeps_fp32_weights_in_a_bf16_run_frozen_or_trained() -> None:
    dtypes, is_rounded, grad_dtypes = run_single(_full_in_bf16)
    assert dtypes == {torch.float32} and grad_dtypes == {torch.float32}
    assert not is_rounded


def _full_in_bf16() -> tuple[set[torch.dtype], bool, set[torch.dtype | None]]:
    """The weights' dtypes, whether those of the trained layer are bf16 values, and the dtypes of its gradients."""
    trained = LayerSettings(precision="full")
    chunk = build({0: replace(DUAL, precision="full"), 1: trained}, precision="bf16")[0]
    chunk.bfloat16()
    weights = [(number, linear.weight) for number, _, linear in adapted_linears([chunk])]
    tokens = some_tokens()
    chunk(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None).float().sum().backward()
    rounded = all(torch.equal(weight, weight.bfloat16().float()) for number, weight in weights if number)
    return (
        {weight.dtype for _, weight in weights},
        rounded,
        {None if weight.grad is None else weight.grad.dtype for number, weight in weights if number},
    )
