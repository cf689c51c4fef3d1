"""Compares an NPT model with its base model on the same tokens; the results are sums over one rank's tokens.

Every micro-batch is run twice: by the base model (the same model with NP components inactive), and by the NPT model.
The output of each base layer is compared with that of the NPT layer, which is computed in two ways:

    same input      the NPT layer gets the layer's input in the base model (teacher-forced)
    free-running    the NPT layer gets its own input in the NPT model

The run with the same input also gives the squares for `layer_errors`; the run of the NPT model also gives the norms
of every token's delta, v_a and v_b. The last pipeline stage adds -log p(token) of both models and KL(base || NPT) =
sum_v p_v (log p_v - log q_v). Only tokens whose `loss_mask` is above 0 are compared. Hidden states have the shape
[s, b, h]; sequence parallelism is not supported.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.output_with_bias import output_with_bias
from megatron_ext.models.transformer_layer import ExtendedTransformerLayer
from megatron_ext.npt.evaluation.layer_errors import Squares
from megatron_ext.npt.evaluation.replaced_mlp import MLPOutput, replaced_mlp
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward
from megatron_ext.npt.modules.npt_layers import base_mlp, deactivated
from megatron_ext.npt.modules.vector_norms import GeneratedVectors, delta_norms
from megatron_ext.npt.objective.fidelity_loss import log_probabilities
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.microbatches import run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import HiddenStates, NoLoss

SAME_INPUT, FREE_RUNNING = "same_input", "free_running"
"""The two ways to compute an NPT layer's output; see the top of this file."""

_LOGITS_AT_ONCE = 1 << 24
"""Number of logits that a rank computes at a time."""

Sums = npt.NDArray[np.float64]


@dataclass
class Findings:
    """Sums over this rank's tokens, for this rank's layers; the sums of data-parallel ranks are added up later."""

    layers: dict[tuple[str, int], Sums] = field(default_factory=dict)
    """Maps (how, layer), where `how` is SAME_INPUT or FREE_RUNNING, to five numbers: the number of tokens, and the sums
    of squared difference, cosine, squared base output, and squared update (base output - base input).
    """

    vectors: dict[tuple[int, str], Sums] = field(default_factory=dict)
    """Maps (layer, target) to four numbers: the number of tokens, and the sums of |v_a|, of |v_b|, and of the cosine of
    v_a and the attention output.
    """

    deltas: dict[tuple[int, str], list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    """Maps (layer, target) to |delta|_F of every token."""

    errors: dict[int, list[Squares]] = field(default_factory=dict)
    """Maps each layer to the squares of every token; see `layer_errors`."""

    output: Sums = field(default_factory=lambda: np.zeros(4))
    """Number of tokens, and the sums of -log p of the base model, of -log p of the NPT model, and of KL."""


@torch.no_grad()
def compare_layers(chunks: list[GPTModel], families: list[Family], steps: Any) -> Findings:
    """Runs both models on this rank's micro-batches; collective over the model-parallel ranks.

    Args:
        chunks: this rank's model chunks, unwrapped, with NP components, in evaluation mode.
        families: the model families, which supply the model's auxiliary inputs.
        steps: iterable of lists of micro-batches, as returned by `held_out_steps`.
    """
    findings = Findings()
    with _Observer(chunks, findings) as observer:
        for step in steps:
            masks = [batch["loss_mask"].to(process_groups.device()) > 0 for batch in step]
            outputs = HiddenStates()
            observer.begin(masks, base=True)
            with deactivated(chunks):
                run_microbatches(chunks, families, step, outputs, forward_only=True)
            observer.begin(masks, base=False)
            run_microbatches(
                chunks, families, step, CompareOutputs(outputs, findings.output), forward_only=True
            )
    return findings


class _Observer:
    """Context manager whose hooks on the NPT layers record the findings of their forward passes."""

    def __init__(self, chunks: list[GPTModel], findings: Findings) -> None:
        self._chunks = chunks
        self._findings = findings
        self._is_base = True
        self._masks: list[torch.Tensor] = []
        self._passes: dict[int, int] = {}
        """Maps each layer to the index of its current micro-batch; a stage processes micro-batches in order."""
        self._base: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """Maps each layer to its input and output in the base model, for each micro-batch."""
        self._base_mlp: torch.Tensor | None = None
        """MLP(LN2(h + a)) of the most recent base layer."""
        self._activated: torch.Tensor | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "_Observer":
        for chunk in self._chunks:
            for layer in chunk.decoder.layers:
                if not isinstance(layer.feed_forward, NPFeedForward):
                    continue
                for hook in (
                    layer.register_forward_hook(self._after_layer, with_kwargs=True),
                    layer.mlp.register_forward_hook(self._after_base_mlp),
                    layer.mlp.linear_fc2.register_forward_pre_hook(self._before_fc2),
                ):
                    self._undo.callback(hook.remove)
        self._undo.enter_context(replaced_mlp(self._chunks, self._observed))
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def begin(self, masks: list[torch.Tensor], *, base: bool) -> None:
        """Prepares for a run of one model; tokens are compared where the mask [b, s] of their micro-batch is True."""
        self._masks, self._is_base, self._passes = masks, base, {}
        if base:
            self._base = {}

    def _after_layer(
        self, layer: ExtendedTransformerLayer, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        number = layer.layer_number - 1
        index = self._passes[number] = self._passes.get(number, -1) + 1
        mask = self._masks[index].t()
        if not self._is_base:
            self._add(FREE_RUNNING, number, output[0], self._base[number][index], mask)
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        # Detach the tensors, because the pipeline schedule may free the data of tensors that it has sent.
        base = hidden_states.detach(), output[0].detach()
        self._base.setdefault(number, []).append(base)
        layer.feed_forward.active = True
        same_input, _ = layer.forward(*args, **kwargs)
        layer.feed_forward.active = False
        self._add(SAME_INPUT, number, same_input, base, mask)

    def _add(
        self,
        how: str,
        number: int,
        output: torch.Tensor,
        base: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> None:
        ours, theirs, inputs = output[mask].double(), base[1][mask].double(), base[0][mask].double()
        values = torch.stack(
            [
                (ours - theirs).square().sum(),
                torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).sum(),
                theirs.square().sum(),
                (theirs - inputs).square().sum(),
            ]
        )
        sums = np.array([len(ours), *values.tolist()])
        add_to(self._findings.layers, (how, number), sums)

    def _after_base_mlp(self, mlp: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._base_mlp = output_with_bias(output)

    def _before_fc2(self, linear: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._activated = inputs[0]

    def _observed(self, module: NPFeedForward) -> MLPOutput:
        """Returns a function that calls the module's `mlp_output` and also records findings."""
        compute, number = module.mlp_output, module.layer_number - 1

        def observe(layer: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
            output = compute(layer, hidden_states, attention_output)
            if self._is_base:
                mask = self._masks[self._passes[number]].t()
                self._add_errors(module, layer, hidden_states, attention_output, output, mask)
            else:
                mask = self._masks[self._passes.get(number, -1) + 1].t()
                if bool(mask.any()):
                    self._add_deltas(module, layer, hidden_states[mask], attention_output[mask], mask)
            return output

        return observe

    def _add_errors(
        self,
        module: NPFeedForward,
        layer: Any,
        hidden_states: torch.Tensor,
        attention_output: torch.Tensor,
        output: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        assert self._base_mlp is not None
        target = self._base_mlp[mask].double()
        if module.settings.np_residual == "drop":
            target = target + attention_output[mask].double()
        untrained = base_mlp(layer, hidden_states)
        squares = [target, output[mask].double() - target, untrained[mask].double() - target]
        values = torch.stack([square.square().sum(-1) for square in squares], dim=-1)
        self._findings.errors.setdefault(module.layer_number - 1, []).append(values.float().cpu().numpy())

    def _add_deltas(
        self,
        module: NPFeedForward,
        layer: Any,
        hidden_states: torch.Tensor,
        attention: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        assert self._activated is not None
        number, activated = module.layer_number - 1, self._activated[mask]
        for target, part in module.modulations.items():
            norms = delta_norms(part, attention, activated, layer, hidden_states)
            self._findings.deltas.setdefault((number, target), []).append(norms.float().cpu().numpy())
            if module.settings.np_form == "outer_product" and not part.reads_ffn:
                vectors = GeneratedVectors(part, attention)
                means = [vectors.a_norm(), vectors.b_norm(), vectors.similarity()]
                sums = len(attention) * np.array([1.0, *map(float, means)])
                add_to(self._findings.vectors, (number, target), sums)


def add_to(totals: dict[Any, Sums], key: Any, sums: Sums) -> None:
    """Adds `sums` to `totals[key]`; creates the entry if it is missing."""
    totals[key] = totals[key] + sums if key in totals else sums


class CompareOutputs(NoLoss):
    """Adds up -log p of both models and KL(base || NPT); computes the logits of a few positions at a time."""

    def __init__(self, base: HiddenStates, sums: Sums) -> None:
        """Args:
        base: the base model's outputs for the micro-batches that the NPT model will run.
        sums: four numbers to which the sums are added; see `Findings.output`.
        """
        self._base = iter(base.values)
        self._sums = sums

    def __call__(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        base = next(self._base)
        mask, labels = batch["loss_mask"].t() > 0, batch["labels"].t()
        vocabulary = model.output_layer.output_size_per_partition
        rows = max(1, _LOGITS_AT_ONCE // (vocabulary * output.size(1)))
        for start in range(0, len(output), rows):
            part = slice(start, start + rows)
            ours, theirs = model.logits(output[part]), model.logits(base[part])
            self._sums += _compare_logits(theirs, ours, labels[part], mask[part], model)
        return super().__call__(model, batch, output)


def _compare_logits(
    base: torch.Tensor, ours: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, model: GPTModel
) -> Sums:
    """Returns the number of tokens and the sums of each model's -log p and of KL; logits [s, b, V/t], labels [s, b]."""
    group = model.pg_collection.tp
    log_p, log_q = log_probabilities(base, group), log_probabilities(ours, group)
    begin = group.rank() * log_p.size(-1)
    here = (labels >= begin) & (labels < begin + log_p.size(-1))
    index = (labels - begin).clamp(0, log_p.size(-1) - 1).unsqueeze(-1)
    values = torch.stack(
        [
            -log_p.gather(-1, index).squeeze(-1) * here,
            -log_q.gather(-1, index).squeeze(-1) * here,
            (log_p.exp() * (log_p - log_q)).sum(-1),
        ]
    )
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return np.array([int(mask.sum()), *values[:, mask].double().sum(-1).tolist()])
