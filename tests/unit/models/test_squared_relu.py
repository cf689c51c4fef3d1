"""--squared-relu: the MLP is max(x W1 + b1, 0)^2 W2 + b2, and so is its gradient."""

from dataclasses import replace

import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE

MODEL = replace(TINY, swiglu=False, squared_relu=True, disable_bias_linear=False)


def _against_the_formula() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and input gradient of a layer's MLP, each with the formula's in float64."""
    initialize(ParallelConfig(), seed=1)
    (chunk,) = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)
    mlp = chunk.decoder.layers[0].mlp
    inputs = torch.randn(5, 2, MODEL.hidden_size, requires_grad=True)
    output, bias = mlp(inputs)
    found = output + bias
    found.square().sum().backward()
    wide = inputs.detach().double().requires_grad_()
    weights = {name: parameter.detach().double() for name, parameter in mlp.named_parameters()}
    inner = wide @ weights["linear_fc1.weight"].T + weights["linear_fc1.bias"]
    wanted = inner.clamp(min=0) ** 2 @ weights["linear_fc2.weight"].T + weights["linear_fc2.bias"]
    wanted.square().sum().backward()
    assert inputs.grad is not None and wide.grad is not None
    return [(found.detach(), wanted.detach()), (inputs.grad, wide.grad)]


def test_the_mlp_and_its_gradient_are_those_of_the_formula() -> None:
    for found, wanted in run_single(_against_the_formula):
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.norm()))
