"""Inputs and losses of one NPT layer in one training step.

These are the losses of docs/design (`--layer-losses document`). MLP* is the modulated MLP, n its normed input, h the
layer's input and a the attention output. The target is the value of MLP*(n) with which the layer's output equals the
base layer's; it depends on np_residual:

    target              drop  a + MLP(LN2(h + a))    keep  MLP(LN2(h + a))           no gradient flows to it
    direct MLP          MSE(MLP*(n), target) / (rms(target) + 1e-6) per sequence, times the layer's weight
    equivalence         MSE, or mean of 1 - cosine, between the layer's output and the base layer's for the same input
    reconstruction      MSE(v_a, a) / (rms(a) + 1e-6) per sequence + 0.5 (1 - cos(v_a, a))      outer_product on gate
    regularization      |A|_F + |B|_F over all targets; outer_product: mean v_a^2 + mean v_b^2 of gate

`--layer-losses local` changes three things, which matter for deep models and for real activations:

    inputs      h and a are detached, so that a layer's losses train only its own factors. Otherwise they would also
                train the layers below through h and a, while the target is held constant
    tokens      each token's squared error is divided by a mean square of the same token, so that one token with massive
                activations cannot outweigh all others; mean is over h, and E over tokens:
                direct MLP          E [ mean (MLP*(n) - target)^2 / (mean target^2 + 1e-12) ]
                equivalence, MSE    E [ mean (output - base output)^2 / (mean (base output)^2 + 1e-12) ]
    layers      the layers' weights are divided by their sum: the total is a mean over layers instead of a sum

The input of attention and of the MLP is `(1 - share) * teacher + share * student`, where `teacher` is this layer's
input in the base model. With a share of 0 no gradient reaches the layers below. Means are over all tokens of the global
batch, including tokens that are masked in the output's loss, because later tokens attend to them. The formulas in
docs/design divide by the rms of a whole micro-batch. This file divides by the rms of each sequence, so that the loss
does not depend on the division of the global batch into micro-batches. For tensor and sequence parallelism see
`vector_norms`.
Source: docs/design/npt_sequential.md, docs/design/npt_curriculum.md, docs/design/npt_equivalence.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.auxiliary_inputs import LayerInputs
from megatron_ext.npt.modules.layer_step import LayerStep
from megatron_ext.npt.modules.npt_layers import base_mlp
from megatron_ext.npt.modules.teacher_inputs import TEACHER
from megatron_ext.npt.modules.vector_norms import GeneratedVectors, delta_norms, factor_norm
from megatron_ext.npt.objective.step_objective import LayerWeights


@dataclass(frozen=True, kw_only=True)
class LayerStepLosses(LayerStep):
    """Chooses the inputs and computes the losses of one layer in the current step."""

    weights: LayerWeights
    """Weights of the layer's losses."""

    attention_share: float = 1.0
    """The student's share in attention's input; the rest is the teacher's."""

    mlp_share: float = 1.0
    """The student's share in the MLP's input and in the residual."""

    place: tuple[int, int] = (0, 1)
    """Index of the layer among the NPT layers of its chunk, and the number of NPT layers in the chunk."""

    teacher_mlp: torch.Tensor | None = None
    """MLP(LN2(h + a)) [s, b, h] for the layer's h and a, if already known; None to compute it."""

    records: bool = False
    """Whether to log the norms of v_a, v_b and the deltas in this step."""

    @property
    def needs_teacher(self) -> bool:
        """Whether attention's or the MLP's input contains the teacher's hidden states."""
        return min(self.attention_share, self.mlp_share) < 1

    @property
    def ignores_student(self) -> bool:
        """Whether the inputs of attention and MLP are independent of the student's hidden states."""
        return max(self.attention_share, self.mlp_share) == 0

    def inputs(
        self, hidden_states: torch.Tensor, layer_inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the inputs of attention and MLP, blended from teacher and student; see `LayerStep.inputs`."""
        if not self.needs_teacher:
            return hidden_states, hidden_states
        teacher = layer_inputs.read_part(TEACHER, *self.place)
        attention_input = _blended(teacher, hidden_states, self.attention_share)
        if self.mlp_share == self.attention_share:
            return attention_input, attention_input
        return attention_input, _blended(teacher, hidden_states, self.mlp_share)

    def attach(
        self,
        module: Any,
        layer: Any,
        inputs: tuple[torch.Tensor, torch.Tensor],
        attention_output: torch.Tensor,
        mlp_output: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the losses and attaches them to the output; see `LayerStep.attach`."""
        student, hidden_states = inputs
        if self.weights.local:
            hidden_states, attention_output, mlp_output = self._detached(
                module, layer, hidden_states, attention_output, mlp_output
            )
        terms = self._terms(module, layer, hidden_states, attention_output, mlp_output)
        losses = [weight * value for weight, value in terms.values() if weight]
        share = 1 / module.tp_group.size() if module.config.sequence_parallel else 1.0
        if self.ignores_student:
            output = attach_zero_gradient(output, student)
        values = {name: value for name, (_, value) in terms.items()}
        total = torch.stack(losses).sum() if losses else None
        if total is not None:
            values["npt_loss"] = total
        _record(module, values)
        return output if total is None else LayerLosses.attach(output, share * total)

    def _detached(
        self,
        module: Any,
        layer: Any,
        hidden_states: torch.Tensor,
        attention_output: torch.Tensor,
        mlp_output: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns h and a, detached, and MLP*(n), whose gradient reaches only this layer's own parameters."""
        if not (hidden_states.requires_grad or attention_output.requires_grad):
            return hidden_states, attention_output, mlp_output
        hidden_states, attention_output = hidden_states.detach(), attention_output.detach()
        if self.weights.compares_outputs:
            mlp_output = module.mlp_output(layer, hidden_states, attention_output)
        return hidden_states, attention_output, mlp_output

    def _terms(
        self,
        module: Any,
        layer: Any,
        hidden_states: torch.Tensor,
        attention_output: torch.Tensor,
        mlp_output: torch.Tensor,
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Returns the weight and the value (a mean over this rank's tokens) of each loss, by name."""
        terms = dict[str, tuple[float, torch.Tensor]]()
        if self.weights.compares_outputs:
            target = self._target(module, layer, hidden_states, attention_output)
            residual = None
            if self.weights.equivalence:
                keeps = module.settings.np_residual == "keep"
                residual = hidden_states + attention_output if keeps else hidden_states
            terms = self._output_terms(module, mlp_output, target, residual)
        return terms | self._factor_terms(module, layer, hidden_states, attention_output)

    @torch.no_grad()
    def _target(
        self, module: Any, layer: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        """Returns the target of MLP*(n); see the formulas at the top of this file."""
        output = self.teacher_mlp
        if output is None:
            output = base_mlp(layer, hidden_states + attention_output)
        return output if module.settings.np_residual == "keep" else output + attention_output

    def _output_terms(
        self, module: Any, mlp_output: torch.Tensor, target: torch.Tensor, residual: torch.Tensor | None
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Returns the direct MLP loss and the equivalence loss, without losses of weight 0.

        `residual` is the tensor that the layer adds to the MLP's output; only the equivalence loss uses it.
        """
        weights, terms = self.weights, dict[str, tuple[float, torch.Tensor]]()
        errors = (mlp_output - target).float().square()
        if weights.direct_mlp and weights.local:
            terms["mlp_direct_loss"] = (weights.direct_mlp, _per_token(errors, target))
        elif weights.direct_mlp:
            size = _mean_over_ranks(module, target.float().square().mean((0, 2))).sqrt()
            terms["mlp_direct_loss"] = (weights.direct_mlp, (errors.mean((0, 2)) / (size + 1e-6)).mean())
        if residual is not None:
            if weights.equivalence_loss == "cosine":
                cosine = F.cosine_similarity((residual + mlp_output).float(), (residual + target).float(), -1)
                value = (1 - cosine).mean()
            else:
                value = _per_token(errors, residual + target) if weights.local else errors.mean((0, 2)).mean()
            terms["equivalence_loss"] = (weights.equivalence, value)
        return terms

    def _factor_terms(
        self, module: Any, layer: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor
    ) -> dict[str, tuple[float, torch.Tensor]]:
        weights, terms = self.weights, dict[str, tuple[float, torch.Tensor]]()
        has_vectors = module.settings.np_form == "outer_product"
        first = next(iter(module.modulations.values()))
        vectors = GeneratedVectors(first, attention_output) if has_vectors else None
        if weights.reconstruction:
            assert vectors is not None, "reconstruction requires outer_product; `check_module` ensures that"
            similarity = vectors.similarity()
            size = _mean_over_ranks(module, vectors.attention_square().detach()).sqrt()
            error = (vectors.reconstruction_error() / (size + 1e-6)).mean()
            terms["attention_reconstruction_loss"] = (weights.reconstruction, error + 0.5 * (1 - similarity))
        if weights.regularization:
            value = (
                vectors.a_square() + vectors.b_square()
                if vectors is not None
                else torch.stack([factor_norm(part) for part in module.modulations.values()]).sum()
            )
            terms["regularization_loss"] = (weights.regularization, value)
        if self.records:
            with torch.no_grad():
                if vectors is not None:
                    terms["v_a_attention_similarity"] = (0.0, vectors.similarity().detach())
                    terms["v_a_norm"] = (0.0, vectors.a_norm())
                    terms["v_b_norm"] = (0.0, vectors.b_norm())
                norms = delta_norms(first, attention_output, layer=layer, hidden_states=hidden_states)
                terms["delta_norm"] = (0.0, norms.mean())
        return terms


def _record(module: Any, values: dict[str, torch.Tensor]) -> None:
    """Records a layer's scalars, which are means over this rank's tokens, and reduces all of them in one call."""
    if values:
        means = _mean_over_ranks(module, torch.stack([value.detach() for value in values.values()]))
        for name, mean in zip(values, means, strict=True):
            LayerLosses.record(f"{name}/layer_{module.layer_number - 1}", mean)


def attach_zero_gradient(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns `value`; the backward pass through the result also reaches `other`, with a gradient of zero.

    This is needed if the output's loss does not depend on the layers that compute `other`. The backward pass must still
    reach those layers: losses are attached to them, and their pipeline stage waits for a gradient.
    """
    return _Connect.apply(value, other)


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(other)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        (other,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(other) if ctx.needs_input_grad[1] else None


def _per_token(errors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Divides each token's mean of `errors` by its mean square of `reference`; returns the mean over tokens.

    Args:
        errors: squared errors, [s, b, h], fp32.
        reference: has the same shape; no gradient flows to it.
    """
    size = reference.detach().float().square().mean(-1)
    return (errors.mean(-1) / (size + 1e-12)).mean()


def _blended(teacher: torch.Tensor, student: torch.Tensor, share: float) -> torch.Tensor:
    if share == 0:
        return teacher
    return student if share == 1 else torch.lerp(teacher, student, share)


def _mean_over_ranks(module: Any, value: torch.Tensor) -> torch.Tensor:
    """Returns `value`, a mean over this rank's tokens, averaged over the ranks that share its sequences.

    These are the sequence-parallel and the context-parallel ranks. No gradient flows through the result.
    """
    value = value.detach().clone()
    groups = [module.tp_group] if module.config.sequence_parallel else []
    for group in (*groups, module.context_group):
        if group.size() > 1:
            dist.all_reduce(value, group=group)
            value /= group.size()
    return value
