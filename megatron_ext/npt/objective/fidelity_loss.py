"""NPT's losses on the student's output: cross-entropy, and fidelity to the base model's logits.

The total is `lm_weight * lm + fidelity_weight * fidelity`, where fidelity has one of two forms:

    lm          cross-entropy
    fidelity    kl     mean over tokens of KL(base || NPT) = sum_v p_v (log p_v - log q_v)
                mse    mean over tokens of the mean square of the logits' difference

The vocabulary may be split over tensor-parallel ranks. The softmax's denominator is then summed over the ranks; the
gradient of a rank's logits, q - p, needs no other values from other ranks.
Source: docs/design/npt_sequential.md, docs/design/npt_curriculum.md.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.cross_entropy import blocks
from megatron_ext.npt.objective.layer_losses import attach_zero_gradient
from megatron_ext.npt.objective.teacher import OUTPUT
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import OutputLoss, Reads

Group = dist.ProcessGroup


class NPTOutputLoss(OutputLoss):
    """The loss of the model's output: the weighted sum of cross-entropy and fidelity."""

    def __init__(self, lm_weight: float, fidelity_weight: float, kind: Literal["kl", "mse"]) -> None:
        """Args:
        lm_weight: weight of the cross-entropy.
        fidelity_weight: weight of the fidelity loss.
        kind: the form of the fidelity loss.
        """
        self.lm_weight = lm_weight
        self.fidelity_weight = fidelity_weight
        self.kind = kind
        self.reads: Reads = "logits" if fidelity_weight else "losses" if lm_weight else "hidden"
        self.names = ("lm loss", "fidelity_loss") if fidelity_weight else ("lm loss",) if lm_weight else ()
        weights = {"lm loss": lm_weight, "fidelity_loss": fidelity_weight}
        self.factors: Mapping[str, float] = {name: weight for name, weight in weights.items() if weight}

    def __call__(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of one micro-batch; see `OutputLoss`. The loss is zero if both weights are 0."""
        if self.reads == "hidden":
            # No loss uses the output, but backward must still reach the layer losses below.
            return attach_zero_gradient(output.new_zeros(()).float(), output), {}
        return super().__call__(model, batch, output)

    def of_tokens(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns values and weights per token; see `OutputLoss`. Fidelity needs the teacher's output in the batch."""
        mask = batch["loss_mask"]
        if self.reads == "losses":
            return {"lm loss": (output, mask)}
        logits = output.transpose(0, 1).contiguous()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lm_weight > 0):
            # Pass a copy, because the engine's loss modifies the logits, which the fidelity loss also needs.
            lm = model.compute_language_model_loss(batch["labels"], logits.clone())
        with torch.no_grad():
            teacher = model.logits(batch[OUTPUT].to(model.config.params_dtype))
        measure = kl_divergence if self.kind == "kl" else logits_mse
        fidelity = measure(teacher, logits, model.pg_collection.tp).transpose(0, 1)
        return {"lm loss": (lm, mask), "fidelity_loss": (fidelity, mask)}


def kl_divergence(base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
    """Computes KL(base || model) of every token; no gradient flows to `base`.

    The backward pass overwrites what the forward pass has saved, so it can run only once.

    Args:
        base: logits of the reference, [s, b, V/t].
        model: logits of the model, [s, b, V/t].
        group: the ranks over which the vocabulary is split.

    Returns:
        [s, b], in nats.
    """
    return _KLDivergence.apply(base, model, group)


def logits_mse(base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
    """Computes the mean square of the logits' difference of every token, [s, b]; arguments as for `kl_divergence`."""
    return _LogitsMSE.apply(base, model, group)


def log_probabilities(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """Returns the log-softmax over a vocabulary that is split over the group: [s, b, V/t], fp32, without gradient."""
    logits = logits.detach().float()
    largest = logits.max(-1, keepdim=True).values
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest
    return shifted - _summed(shifted.exp().sum(-1, keepdim=True), group).log()


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
        base_rows, rows = (logits.reshape(-1, logits.size(-1)) for logits in (base, model))
        difference = torch.empty_like(rows)
        divergence = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        # Every block is reduced over the ranks, so use few large blocks if there are several ranks.
        for block in blocks(rows, "cuda" if group.size() > 1 else None):
            log_p, log_q = log_probabilities(base_rows[block], group), log_probabilities(rows[block], group)
            p = log_p.exp()
            divergence[block] = log_p.sub_(log_q).mul_(p).sum(-1)
            difference[block] = log_q.exp_().sub_(p)
        ctx.save_for_backward(difference)
        return _summed(divergence, group).view(model.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        # Multiply in place, because the tensor is as large as the logits, and the backward pass runs only once.
        return None, difference.mul_(grads[0].reshape(-1, 1)).view(*grads[0].shape, -1), None


class _LogitsMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
        difference = model.detach().float() - base.float()
        ctx.size = difference.size(-1) * group.size()
        ctx.dtype = model.dtype
        ctx.save_for_backward(difference)
        return _summed(difference.square().sum(-1), group) / ctx.size

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return None, (difference * (grads[0].unsqueeze(-1) * (2 / ctx.size))).to(ctx.dtype), None


def _summed(value: torch.Tensor, group: Group) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value
