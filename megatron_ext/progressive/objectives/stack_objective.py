"""The training objective of a stack: turns batches of the dataset into inputs, labels and loss weights.

A stack is a group of layers that are trained together. Predictions of the model (--training-objective):

    clm         the next token, with causal attention. The last token counts only if the data contains its successor.
    mlm         the tokens that were replaced by the mask token, with bidirectional attention
    diffusion   the same, with weight 1/f for a sequence whose masked fraction is f: with t ~ U[0, 1] the loss is
                an upper bound of the negative log-likelihood per token (arXiv 2406.07524)
    custom      targets that the data contains, with bidirectional attention

A batch gets `tokens`, `labels`, `loss_mask`, `masks` (positions that the objective predicts) and `combined_masks`
(positions that count in the loss, without weights). With clm, the batch also gets `clm_mask` (1 where the next token
is known); with mlm and diffusion, `time_step`. Source: docs/design/progressive_growth.md.
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
"""Name of an evaluation result: the share of correct predictions among the tokens that count in the loss."""

MASK_TOKENS = ("<|mask|>", "[MASK]", "<mask>")
"""Names by which the mask token of a vocabulary is recognised."""

_LOOKS_AHEAD = "per_layer_ids"
"""Name of a batch field that is computed from the unmasked tokens, and would reveal the masked tokens."""


def reserve_mask_token(tokenizer: Tokenizer, mask_token_id: int | None = None) -> int:
    """Adds the mask token to the vocabulary, and returns its id; call this before `vocab_size` is used."""
    mask_token_id = mask_token_of(tokenizer, mask_token_id)
    tokenizer.reserve(mask_token_id + 1)
    return mask_token_id


def mask_token_of(tokenizer: Tokenizer, mask_token_id: int | None = None) -> int:
    """Returns the id of the mask token: the given id or, by default, the vocabulary's mask token or the first unused
    id.

    Args:
        tokenizer: the run's tokenizer.
        mask_token_id: value of --mask-token-id, or None.

    Raises:
        ValueError: the given id is the end-of-document token, or larger than the first unused id.
    """
    known = [tokenizer.vocab[token] for token in MASK_TOKENS if token in tokenizer.vocab]
    if mask_token_id is None:
        mask_token_id = known[0] if known else tokenizer.vocab_size
    if mask_token_id == tokenizer.eod or mask_token_id > tokenizer.vocab_size:
        raise ValueError(
            f"--mask-token-id {mask_token_id}: must be an id that does not occur in texts, and at most "
            f"{tokenizer.vocab_size}, the first id after the vocabulary"
        )
    return mask_token_id


class StackObjective:
    """The training objective of one stack: prepares its batches, and supplies its evaluation loss."""

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
        config: contains the objective, the time steps and the mask fractions.
        stack_idx: index of the stack that is trained, in the order of creation, from 0.
        seed: seed of the masks.
        mask_token_id: id of the mask token, from `reserve_mask_token`; None for objectives without masks.
        fixed_masks: whether a sample has the same masks in every epoch, as the activation cache requires.
        """
        self.config = config
        self.kind: Literal["mlm", "clm", "diffusion", "custom"] = config.training_objective
        self.stack_idx = stack_idx
        self.mask_token_id = mask_token_id
        self.masking = TimeStepMasking(config, seed=seed, fixed=fixed_masks)
        assert (mask_token_id is not None) or not self.masks_tokens, "mlm and diffusion require mask_token_id"

    @property
    def masks_tokens(self) -> bool:
        """Whether the objective masks tokens (mlm, diffusion)."""
        return self.kind in ("mlm", "diffusion")

    @property
    def bidirectional(self) -> bool:
        """Whether every position attends to all positions, not only to earlier ones."""
        return self.kind != "clm"

    @property
    def embeds_time(self) -> bool:
        """Whether the time step is an input of the model."""
        return self.masks_tokens and self.config.time_interpretation == "input"

    def make_batch(self, batch: Batch) -> Batch:
        """Turns a micro-batch of the dataset into inputs, labels and loss weights.

        Args:
            batch: contains `tokens`, `position_ids` and `loss_mask` [b, s]; for clm optionally `labels`; for custom
                `targets` [b, s], which are negative at positions without a target.

        Raises:
            ValueError: the objective is custom and the batch has no targets, or a field of the batch reveals masked
                tokens.
        """
        if self.kind == "clm":
            return _clm(batch)
        made = _custom(batch) if self.kind == "custom" else self._masked(batch)
        if "attention_mask" in batch:
            # The mask forbids attention to later tokens and to other documents. For bidirectional attention, only pairs
            # that are forbidden in both directions stay forbidden: tokens of different documents.
            made["attention_mask"] = batch["attention_mask"] & batch["attention_mask"].transpose(-1, -2)
        return made

    def _masked(self, batch: Batch) -> Batch:
        if _LOOKS_AHEAD in batch:
            raise ValueError(
                f"--training-objective {self.kind}: does not support aligned per-layer data, which "
                "reveals the masked tokens; use --per-layer-vocab-file instead"
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
        """Returns the loss that also measures accuracy on masked tokens; None if no tokens are masked."""
        return MaskedLoss() if self.masks_tokens else None


def _clm(batch: Batch) -> Batch:
    clm_mask = torch.ones_like(batch["loss_mask"])
    labels = batch.get("labels")
    if labels is None:
        # The last token has no known successor. Its label is a placeholder that does not count.
        labels = torch.cat([batch["tokens"][:, 1:], batch["tokens"][:, -1:]], dim=1)
        clm_mask[:, -1] = 0.0
    combined = batch["loss_mask"] * clm_mask
    masks = torch.ones_like(batch["tokens"], dtype=torch.bool)
    named = {"masks": masks, "clm_mask": clm_mask, "combined_masks": combined}
    return batch | named | {"labels": labels, "loss_mask": combined}


def _custom(batch: Batch) -> Batch:
    if "targets" not in batch:
        raise ValueError("--training-objective custom: the batch must contain targets [b, s]")
    masks = batch["targets"] >= 0
    combined = batch["loss_mask"] * masks
    named = {"masks": masks, "combined_masks": combined}
    return batch | named | {"labels": batch["targets"].clamp(min=0), "loss_mask": combined}


class MaskedLoss(OutputLoss):
    """Cross-entropy, and the fraction of tokens that are predicted correctly."""

    reads = "logits"
    names = ("lm loss", ACCURACY)

    def of_tokens(
        self, model: GPTModel, batch: Batch, output: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns values and weights per token; see `OutputLoss`. `output` are logits [b, s, V/t]."""
        right = most_likely(output, model.pg_collection.tp) == batch["labels"]
        # Compute the losses last, because the engine's loss overwrites logits that are split over ranks.
        losses = model.compute_language_model_loss(batch["labels"], output.transpose(0, 1).contiguous())
        return {"lm loss": (losses, batch["loss_mask"]), ACCURACY: (right, batch["combined_masks"])}


def most_likely(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the most likely tokens, [b, s], for logits [b, s, V/t] split over `group`; of equal logits, the first."""
    largest, place = logits.detach().max(-1)
    if group.size() == 1:
        return place
    best = largest.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    place = place + group.rank() * logits.size(-1)
    place = torch.where(largest == best, place, torch.iinfo(place.dtype).max)
    dist.all_reduce(place, op=dist.ReduceOp.MIN, group=group)
    return place
