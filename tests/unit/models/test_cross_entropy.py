"""The cross-entropy in blocks of rows is torch's, in value and gradient, whatever rows the last block has."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.models.ops import cross_entropy as module
from megatron_ext.models.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("rows_of_a_block", [1, 3, 5, 15, 100])
def test_blocks_of_any_size_give_torchs_loss_and_gradient(
    rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 40
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 4 * vocabulary * rows_of_a_block)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 3, vocabulary, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocabulary, (5, 3), generator=generator)
    weights = torch.rand(5, 3, generator=generator)
    found = cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    (wanted_gradient,) = torch.autograd.grad((wanted * weights).sum(), logits)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)


def test_a_row_larger_than_a_block_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 1)
    logits = torch.zeros(2, 8)
    assert torch.allclose(cross_entropy(logits, torch.tensor([0, 7])), torch.full((2,), 8.0).log())
