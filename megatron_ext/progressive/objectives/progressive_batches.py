"""`ProgressiveDataLoader` of the Python API: adds targets, masks, time and cached activations to a loader's batches.

Each batch has these fields:

    batch["tokens"]             the model's input, masked tokens replaced          [b, s]
    batch["labels"]             the target tokens                                  [b, s]
    batch["masks"]              positions that the objective predicts, boolean     [b, s]
    batch["combined_masks"]     positions that count in the loss                   [b, s]
    batch["clm_mask"]           for clm: 1 where the next token is known           [b, s]
    batch["time_step"]          for mlm, diffusion: time step of each sequence     [b]
    batch["training_objective"] the objective's name
    batch["trunk_activations"]  trunk's output, if it is given for all samples     [s, b, h]

`input_ids` and `targets` are other names of `tokens` and `labels`, used in docs/design/progressive_growth.md.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megatron_ext.data.datasets.sample_ids import Id, sample_ids
from megatron_ext.progressive.objectives.masking import TimeStepMasking
from megatron_ext.progressive.objectives.stack_objective import StackObjective
from megatron_ext.training.interface.family_interface import Batch


class ProgressiveDataLoader:
    """Prepares the batches of a loader for training one stack; can be iterated as often as the loader."""

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
        base_dataloader: yields token ids [b, s], or mappings with `tokens` or `input_ids` and optionally `labels`,
            `targets`, `loss_mask`, `position_ids`, `attention_mask`, `epoch`.
        masking_strategy: chooses the masks; its configuration names the objective.
        stack_idx: index of the stack that is trained, in the order of creation, from 0.
        trunk_activations: maps each sample id (`sample_ids` of the unmasked tokens) to the output, [s, h], of the
            layers below the stack.
        cache_activations: whether to use `trunk_activations`.
        mask_token_id: the id that replaces masked tokens, for mlm and diffusion.

        Raises:
            ValueError: the objective masks tokens, but `mask_token_id` is None.
        """
        config = masking_strategy.config
        if config.masks_tokens and mask_token_id is None:
            raise ValueError(f"mask_token_id is required for the objective {config.training_objective}")
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
    """Converts a batch of any loader to the fields of `Batch`; the objective is not yet applied.

    Args:
        batch: token ids [b, s], or a mapping with `tokens` or `input_ids`.

    Raises:
        ValueError: the batch has an unsupported format or shape.
    """
    given: dict[str, torch.Tensor] = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}
    if "input_ids" in given:
        given["tokens"] = given.pop("input_ids")
    tokens = given.get("tokens")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        raise ValueError("a batch must be token ids [b, s], or a mapping with tokens or input_ids")
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    defaults = {"loss_mask": torch.ones_like(tokens, dtype=torch.float32), "position_ids": positions}
    return defaults | given
