"""Generation with a masked-diffusion model: all new tokens start as mask tokens, which are replaced over several steps.

In step i of n (counted from 0) the model predicts every masked token from all known tokens before and after it. The
ceil(masked / (n - i)) most confident predictions are kept, so that no token is masked after n steps. Temperature 0
chooses the most likely token; another temperature T samples from softmax(logits / T). The confidence is the probability
of the chosen token, rounded to five digits; of predictions with equal confidence, the first is kept.

Prompts of equal length form a batch. A KV cache cannot be used, because every token attends to all others. All ranks
take part and get the same tokens, in any tensor- and pipeline-parallel layout.
Source: docs/design/progressive_growth.md; arXiv 2202.04200, 2502.09992.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_ext.inference.generation import (
    check_cache_memory,
    check_max_new_tokens,
    check_seed,
    check_temperature,
    first_of,
    share_from_last_stage,
    stage_logits,
    tempered,
)
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.progressive.objectives.stack_objective import StackObjective
from megatron_ext.progressive.objectives.time_steps import TIME_STEP, time_step_of_fraction
from megatron_ext.training.interface.family_interface import Family


@dataclass(frozen=True, kw_only=True)
class DiffusionSampling:
    """Settings of generation by unmasking."""

    max_new_tokens: int = 64
    """Number of tokens to generate after each prompt."""

    steps: int = 32
    """Number of forward passes; at most one per new token is made."""

    temperature: float = 1.0
    """Number by which the logits are divided; 0 chooses the most likely token."""

    seed: int = 1234
    """Seed of the sampling."""

    stop_tokens: tuple[int, ...] = ()
    """A continuation ends before the first of these tokens."""

    def __post_init__(self) -> None:
        check_max_new_tokens(self.max_new_tokens)
        if self.steps < 1:
            raise ValueError(f"--diffusion-steps {self.steps}: must be at least 1")
        check_temperature(self.temperature)
        check_seed(self.seed)


def objective_of(families: Iterable[Family]) -> StackObjective | None:
    """Returns the training objective of the model family that has one; None if no family has one."""
    found = (getattr(family, "objective", None) for family in families)
    return next((objective for objective in found if isinstance(objective, StackObjective)), None)


@torch.no_grad()
def generate_by_unmasking(
    model: GPTModel,
    families: list[Family],
    prompts: list[list[int]],
    sampling: DiffusionSampling,
    vocab_size: int,
) -> list[list[int]]:
    """Continues prompts by unmasking all new tokens over several steps. Collective.

    Args:
        model: this rank's only model chunk, unwrapped, without sequence parallelism.
        families: the model families, which supply the model's auxiliary inputs; one of them has the objective.
        prompts: token ids of each prompt, which may be empty.
        sampling: settings of the generation.
        vocab_size: the tokenizer's vocabulary size; padding rows and the mask token are never chosen.

    Returns:
        For each prompt, the new tokens before the first stop token; the same on every rank.

    Raises:
        ValueError: the model was not trained on masked tokens, or it has too few positions for prompt and new tokens.
    """
    objective = objective_of(families)
    if objective is None or not objective.masks_tokens:
        raise ValueError("--sampler diffusion: requires a model trained on masked tokens (mlm, diffusion)")
    longest = max(map(len, prompts))
    model.check_length(
        longest + sampling.max_new_tokens,
        f"--max-new-tokens {sampling.max_new_tokens}, after a prompt of {longest} tokens",
    )
    model.eval()
    generator = torch.Generator(device=process_groups.device()).manual_seed(sampling.seed)
    new: dict[int, list[int]] = {}
    for length in sorted(set(map(len, prompts))):
        members = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        given = [prompts[number] for number in members]
        rows = len(members) * (length + sampling.max_new_tokens)
        check_cache_memory(
            rows * vocab_size * 3 * 4, sampling.max_new_tokens
        )  # three tensors: logits, probabilities, and a copy
        tokens = _unmask_all(model, families, objective, given, sampling, vocab_size, generator)
        new |= dict(zip(members, tokens[:, length:].tolist(), strict=True))
    return [new[n][: first_of(sampling.stop_tokens, new[n])] for n in range(len(prompts))]


def _unmask_all(
    model: GPTModel,
    families: list[Family],
    objective: StackObjective,
    prompts: list[list[int]],
    sampling: DiffusionSampling,
    vocab_size: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Returns prompts of equal length with their continuations, [b, s]."""
    assert objective.mask_token_id is not None
    mask_token, device = objective.mask_token_id, process_groups.device()
    given = torch.tensor(prompts, dtype=torch.long, device=device)
    tokens = torch.cat([given, given.new_full((len(prompts), sampling.max_new_tokens), mask_token)], dim=1)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, given.size(1) :] = True
    steps = min(sampling.steps, sampling.max_new_tokens)
    left = sampling.max_new_tokens
    for step in range(steps):
        count = -(-left // (steps - step))
        time_step = time_step_of_fraction(objective.config, left / tokens.size(1))
        batch = {
            "tokens": tokens,
            "position_ids": torch.arange(tokens.size(1), device=device).expand_as(tokens),
            TIME_STEP: torch.full((len(tokens),), time_step, device=device),
        }
        logits = stage_logits(model, families, batch)
        if logits is not None:
            logits[:, :, vocab_size:] = float("-inf")
            logits[:, :, mask_token] = float("-inf")
            tokens = unmask(tokens, masked, logits, count, sampling.temperature, generator)
        share_from_last_stage(tokens)
        masked &= tokens == mask_token
        left -= count
    return tokens


def unmask(
    tokens: torch.Tensor,
    masked: torch.Tensor,
    logits: torch.Tensor,
    count: int,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Replaces masked tokens with the `count` most confident predictions of each row.

    Args:
        tokens: token ids, [b, s].
        masked: True for masked tokens, [b, s]; every row must contain at least `count` masked tokens.
        logits: the model's logits, [b, s, V].
        count: number of predictions to keep per row.
        temperature: see the top of this file.
        generator: random generator for sampling.

    Returns:
        The new tokens, [b, s].
    """
    probabilities = tempered(logits, temperature or 1.0).softmax(-1)
    if temperature == 0:
        confidence, chosen = probabilities.max(-1)
    else:
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        chosen = drawn.view(tokens.shape)
        confidence = probabilities.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    # If all tokens are masked, the model is equally confident at all positions. Without rounding, numerical errors,
    # which depend on the parallel layout, would decide between them.
    ranked = confidence.round(decimals=5).masked_fill(~masked, -1.0).sort(dim=1, descending=True, stable=True)
    places = ranked.indices[:, :count]
    return tokens.scatter(1, places, chosen.gather(1, places))
