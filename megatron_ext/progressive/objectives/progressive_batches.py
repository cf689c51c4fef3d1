"""Document 004's `ProgressiveDataLoader`: a loader's batches with targets, masks, time and cached activations.

    batch["tokens"]             what the model is fed: masked tokens replaced      [b, s]
    batch["labels"]             what it must say                                   [b, s]
    batch["masks"]              what the objective asks for, boolean               [b, s]
    batch["combined_masks"]     what of it counts in the loss                      [b, s]
    batch["clm_mask"]           clm: 1 where the next token is known               [b, s]
    batch["time_step"]          mlm, diffusion                                     [b]
    batch["training_objective"] the objective's name
    batch["trunk_activations"]  where all samples of the batch have one            [s, b, h]

`input_ids` and `targets` are other names of `tokens` and `labels`, as document 004 has them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megatron_ext.data.datasets.sample_ids import Id, sample_ids
from megatron_ext.progressive.objectives.masking import TimeStepMasking
from megatron_ext.progressive.objectives.stack_objective import StackObjective
from megatron_ext.training.interface.family_interface import Batch


class ProgressiveDataLoader:
    """Batches of a loader as one stack's training wants them; may be iterated over as often as the loader."""

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: TimeStepMasking,
        stack_idx: int,
        trunk_activations: Mapping[Id, torch.Tensor] | None = None,
        cache_activations: bool = True,
        *,
        mask_token_id: int | None = None,
    ) -> None:
        """Args:
        base_dataloader: token ids [b, s], or mappings with `tokens` or `input_ids` and perhaps `labels`, `targets`,
            `loss_mask`, `position_ids`, `attention_mask`, `epoch`.
        masking_strategy: draws the masks; its configuration names the objective.
        stack_idx: the stack that trains, in the order in which stacks are made, from 0.
        trunk_activations: sample id (`data.sample_ids`, of the plain tokens) -> the trunk's output for it, [s, h].
        cache_activations: False leaves `trunk_activations` aside.
        mask_token_id: what replaces a masked token, for mlm and diffusion.

        Raises:
            ValueError: masks are asked for, and no mask token is given.
        """
        config = masking_strategy.config
        if config.masks_tokens and mask_token_id is None:
            raise ValueError(f"mask_token_id: needed for the objective {config.training_objective}")
        self.base_dataloader = base_dataloader
        self.trunk_activations = (trunk_activations or {}) if cache_activations else {}
        self.objective = StackObjective(
            config,
            stack_idx=stack_idx,
            seed=masking_strategy.seed,
            mask_token_id=mask_token_id if config.masks_tokens else None,
            fixed_masks=masking_strategy.fixed,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for plain in map(plain_batch, self.base_dataloader):
            batch: dict[str, Any] = dict(self.objective.make_batch(plain))
            batch |= {"input_ids": batch["tokens"], "targets": batch["labels"]}
            batch["training_objective"] = self.objective.kind
            found = [self.trunk_activations.get(sample) for sample in sample_ids(plain["tokens"])]
            if all(value is not None for value in found):
                batch["trunk_activations"] = torch.stack([v for v in found if v is not None], dim=1)
            yield batch


def plain_batch(batch: Any) -> Batch:
    """A loader's batch as the engine names it, before any objective.

    Args:
        batch: token ids [b, s], or a mapping with `tokens` or `input_ids`.

    Raises:
        ValueError: neither, or tokens of another shape.
    """
    given: dict[str, torch.Tensor] = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}
    if "input_ids" in given:
        given["tokens"] = given.pop("input_ids")
    tokens = given.get("tokens")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        raise ValueError("a batch must be token ids [b, s], or hold them as tokens or input_ids")
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    defaults = {"loss_mask": torch.ones_like(tokens, dtype=torch.float32), "position_ids": positions}
    return defaults | given
