"""What a stack is trained for: how plain batches become what the model is fed, what it must say, and what counts.

    clm         the next token; causal attention. Where the data has no token after the last, the last does not count.
    mlm         the tokens that were replaced by the mask token; bidirectional attention
    diffusion   the same, a sequence with fraction f of its tokens masked weighted with 1/f: with t ~ U[0, 1] the loss
                bounds the negative log-likelihood of a token (arXiv 2406.07524)
    custom      targets that the data gives; bidirectional attention

Besides `tokens`, `labels` and `loss_mask` a batch gets `masks` (what the objective asks for), `combined_masks` (what of
it counts: the loss mask without weights), under clm `clm_mask` (1 where the next token is known) as document 004 has
them, and `time_step` under mlm and diffusion.
"""

from typing import Literal

import torch
import torch.distributed as dist

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.progressive.objectives.masking import TimeStepMasking
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.output_losses import OutputLoss

ACCURACY = "masked/token_accuracy"
"""Value of an evaluation: share of the counted tokens whose most likely prediction is right."""

MASK_TOKENS = ("<|mask|>", "[MASK]", "<mask>")
"""What a vocabulary may call its mask token."""

_LOOKS_AHEAD = "per_layer_ids"
"""Aligned data beside the tokens, made from them: it would show what is masked."""


def reserve_mask_token(tokenizer: Tokenizer, mask_token_id: int | None = None) -> int:
    """`mask_token_of`, which the vocabulary then has; call this before its `vocab_size` is used."""
    mask_token_id = mask_token_of(tokenizer, mask_token_id)
    tokenizer.reserve(mask_token_id + 1)
    return mask_token_id


def mask_token_of(tokenizer: Tokenizer, mask_token_id: int | None = None) -> int:
    """The id of the mask token; the one after the vocabulary's last where it has none.

    Args:
        tokenizer: the run's.
        mask_token_id: the user's choice.

    Raises:
        ValueError: the user's id is the end-of-document token's, or not in the vocabulary nor the one after it.
    """
    known = [tokenizer.vocab[token] for token in MASK_TOKENS if token in tokenizer.vocab]
    if mask_token_id is None:
        mask_token_id = known[0] if known else tokenizer.vocab_size
    if mask_token_id == tokenizer.eod or mask_token_id > tokenizer.vocab_size:
        raise ValueError(
            f"--mask-token-id {mask_token_id}: must be an id that no text has, at most {tokenizer.vocab_size} "
            "(one more than the vocabulary's last)"
        )
    return mask_token_id


class StackObjective:
    """The objective of one stack."""

    def __init__(
        self,
        config: ProgressiveConfig,
        *,
        stack_idx: int,
        seed: int,
        mask_token_id: int | None,
        fixed_masks: bool,
    ) -> None:
        """Args:
        config: objective, time and mask fractions.
        stack_idx: the stack that trains, in the order in which stacks are made, from 0.
        seed: of the masks.
        mask_token_id: see `reserve_mask_token`; None for objectives without masks.
        fixed_masks: a sample has the same masks in every epoch; what the activation cache needs.
        """
        self.config = config
        self.kind: Literal["mlm", "clm", "diffusion", "custom"] = config.training_objective
        self.stack_idx = stack_idx
        self.mask_token_id = mask_token_id
        self.masking = TimeStepMasking(config, seed=seed, fixed=fixed_masks)
        assert (mask_token_id is not None) or not self.masks_tokens, "masks need a mask token"

    @property
    def masks_tokens(self) -> bool:
        """Tokens are masked: mlm, diffusion."""
        return self.kind in ("mlm", "diffusion")

    @property
    def bidirectional(self) -> bool:
        """Every position attends to all others."""
        return self.kind != "clm"

    @property
    def embeds_time(self) -> bool:
        """The model is told the time step."""
        return self.masks_tokens and self.config.time_interpretation == "input"

    def make_batch(self, batch: Batch) -> Batch:
        """What the model is fed and asked, from a micro-batch of the data.

        Args:
            batch: `tokens`, `position_ids`, `loss_mask` [b, s]; for clm also `labels`, which may be missing; for custom
                `targets` [b, s], negative where there is none.

        Raises:
            ValueError: custom without targets, or the data shows what is masked.
        """
        if self.kind == "clm":
            return _clm(batch)
        made = _custom(batch) if self.kind == "custom" else self._masked(batch)
        if "attention_mask" in batch:
            # It forbids what lies ahead and other documents; only what it forbids in both directions stays forbidden.
            made["attention_mask"] = batch["attention_mask"] & batch["attention_mask"].transpose(-1, -2)
        return made

    def _masked(self, batch: Batch) -> Batch:
        if _LOOKS_AHEAD in batch:
            raise ValueError(
                f"--training-objective {self.kind}: aligned per-layer data would show the masked tokens; "
                "use --per-layer-vocab-file instead"
            )
        drawn = self.masking.draw(batch, self.stack_idx)
        tokens, combined = batch["tokens"], drawn.masks.float()
        assert self.mask_token_id is not None
        weights = combined
        if self.kind == "diffusion":
            eligible = (batch["loss_mask"] != 0).sum(1, keepdim=True)
            weights = combined * eligible / combined.sum(1, keepdim=True).clamp(min=1.0)
        return batch | {
            "tokens": tokens.masked_fill(drawn.masks, self.mask_token_id),
            "labels": tokens,
            "loss_mask": weights,
            "masks": drawn.masks,
            "combined_masks": combined,
            TIME_STEP: drawn.time_steps,
        }

    def evaluation_loss(self) -> OutputLoss | None:
        """Cross-entropy and accuracy on masked tokens; None for plain cross-entropy."""
        return MaskedLoss() if self.masks_tokens else None


def _clm(batch: Batch) -> Batch:
    clm_mask = torch.ones_like(batch["loss_mask"])
    labels = batch.get("labels")
    if labels is None:
        # No token follows the last: it is given itself as label, and does not count.
        labels = torch.cat([batch["tokens"][:, 1:], batch["tokens"][:, -1:]], dim=1)
        clm_mask[:, -1] = 0.0
    combined = batch["loss_mask"] * clm_mask
    masks = torch.ones_like(batch["tokens"], dtype=torch.bool)
    named = {"masks": masks, "clm_mask": clm_mask, "combined_masks": combined}
    return batch | named | {"labels": labels, "loss_mask": combined}


def _custom(batch: Batch) -> Batch:
    if "targets" not in batch:
        raise ValueError("--training-objective custom: the data must give targets [b, s]")
    masks = batch["targets"] >= 0
    combined = batch["loss_mask"] * masks
    named = {"masks": masks, "combined_masks": combined}
    return batch | named | {"labels": batch["targets"].clamp(min=0), "loss_mask": combined}


class MaskedLoss(OutputLoss):
    """Cross-entropy, and how often the most likely token is the right one."""

    reads = "logits"
    names = ("lm loss", ACCURACY)

    def of_tokens(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """See `OutputLoss`; `output` is [b, s, V/t]."""
        right = most_likely(output, model.pg_collection.tp) == batch["labels"]
        # The engine's loss of split logits works in their place: it comes last.
        losses = model.compute_language_model_loss(batch["labels"], output.transpose(0, 1).contiguous())
        return {"lm loss": (losses, batch["loss_mask"]), ACCURACY: (right, batch["combined_masks"])}


def most_likely(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The most likely token [b, s] under logits [b, s, V/t] that are split over `group`; the first of equals."""
    largest, place = logits.detach().max(-1)
    if group.size() == 1:
        return place
    best = largest.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    place = place + group.rank() * logits.size(-1)
    place = torch.where(largest == best, place, torch.iinfo(place.dtype).max)
    dist.all_reduce(place, op=dist.ReduceOp.MIN, group=group)
    return place
