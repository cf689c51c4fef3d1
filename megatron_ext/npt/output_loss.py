"""NPT's losses on the model's output, of the student that runs as its curriculum says.

    lm          cross-entropy
    fidelity    kl     token mean of KL(base || NPT) = sum_v p_v (log p_v - log q_v)
                mse    token mean of the mean square of the logits' difference
    total       lm_weight * lm + fidelity_weight * fidelity

The vocabulary may be split over tensor-parallel ranks: the normaliser is reduced over them, and the gradient with
respect to a rank's logits, q - p, needs none of the others'. Source: documents 000, 001.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.plan import connect
from megatron_ext.npt.teacher import OUTPUT
from megatron_ext.training.family import Batch
from megatron_ext.training.output_loss import OutputLoss, Reads, masked_mean

Group = dist.ProcessGroup


class NPTOutputLoss(OutputLoss):
    """Weighted sum of cross-entropy and fidelity."""

    def __init__(self, lm_weight: float, fidelity_weight: float, kind: Literal["kl", "mse"]) -> None:
        """Args:
        lm_weight: of the cross-entropy.
        fidelity_weight: of the fidelity.
        kind: how fidelity is measured.
        """
        self.lm_weight = lm_weight
        self.fidelity_weight = fidelity_weight
        self.kind = kind
        self.reads: Reads = "logits" if fidelity_weight else "losses" if lm_weight else "hidden"
        self.names = ("lm loss", "fidelity_loss") if fidelity_weight else ("lm loss",) if lm_weight else ()

    def __call__(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `OutputLoss`; the batch holds the teacher's output where fidelity has a weight."""
        if self.reads == "hidden":
            # Nothing of the output is trained; the layers below have losses of their own, which a pass must reach.
            # (A copy: the engine scales a loss in place, which a view does not bear.)
            return connect(output.new_zeros(()).float(), output).clone(), {}
        if self.reads == "losses":
            lm = masked_mean(output, batch["loss_mask"])
            return self.lm_weight * lm, {"lm loss": lm.detach().clone()}
        logits = output.transpose(0, 1).contiguous()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lm_weight > 0):
            lm = masked_mean(
                # In-place work on logits that the other loss needs too is the engine's habit.
                model.compute_language_model_loss(batch["labels"], logits.clone()),
                batch["loss_mask"],
            )
        with torch.no_grad():
            teacher = model.logits(batch[OUTPUT].to(model.config.params_dtype))
        measure = kl_divergence if self.kind == "kl" else logits_mse
        fidelity = masked_mean(
            measure(teacher, logits, model.pg_collection.tp).transpose(0, 1), batch["loss_mask"]
        )
        total = self.fidelity_weight * fidelity + (self.lm_weight * lm if self.lm_weight else 0.0)
        return total, {"lm loss": lm.detach().clone(), "fidelity_loss": fidelity.detach().clone()}


def kl_divergence(base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
    """KL(base || model) of every token in nats, [s, b], from logits [s, b, V/t]; no gradient to `base`.

    Args:
        base: logits of the reference.
        model: logits of the model.
        group: over which the vocabulary is split.
    """
    return _KLDivergence.apply(base, model, group)


def logits_mse(base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
    """Mean square of the logits' difference over the vocabulary, [s, b], from [s, b, V/t]; see `kl_divergence`."""
    return _LogitsMSE.apply(base, model, group)


def log_probabilities(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """log softmax in fp32 over a vocabulary that is split over the group, [s, b, V/t]; no gradient."""
    logits = logits.detach().float()
    largest = logits.max(-1, keepdim=True).values
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest
    return shifted - _summed(shifted.exp().sum(-1, keepdim=True), group).log()


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, model: torch.Tensor, group: Group) -> torch.Tensor:
        log_p, log_q = log_probabilities(base, group), log_probabilities(model, group)
        p = log_p.exp()
        divergence = _summed((p * (log_p - log_q)).sum(-1), group)
        ctx.dtype = model.dtype
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return divergence

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return None, (difference * grads[0].unsqueeze(-1)).to(ctx.dtype), None


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
