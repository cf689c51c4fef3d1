"""Generates continuations of the same prompts with the base model and with the NPT model, greedily and by sampling."""

from dataclasses import replace
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.training.interface.family_interface import Family


def paired_generations(
    model: GPTModel,
    families: list[Family],
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
) -> list[dict[str, Any]]:
    """Continues every prompt with both models, greedily and by sampling. Collective; every rank gets the results.

    Args:
        model: this rank's only model chunk, unwrapped, with NP components.
        families: the model families, which supply the model's auxiliary inputs.
        tokenizer: the model's tokenizer.
        prompts: the texts to continue.
        sampling: settings of the sampled continuations; the greedy ones use the same settings with temperature 0.
            With temperature 0, there are only greedy continuations.

    Returns:
        A dictionary for each prompt and mode: `prompt`, `mode` (greedy or sampled), `seed`, `temperature`, `base` and
        `npt` (the new texts), `identical`, `first_difference` (the number of equal tokens at the beginning), `tokens`
        (the number of tokens in the longer text), and `agreeing_tokens` (the number of positions with the same token
        in both texts).

    Raises:
        ValueError: a prompt has no tokens or is too long.
    """
    ids = [tokenizer.begin(tokenizer.tokenize(prompt)) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ValueError(f"--prompts {prompt!r}: the prompt has no tokens")
    found = []
    modes = {"greedy": replace(sampling, temperature=0.0)}
    if sampling.temperature > 0:
        modes["sampled"] = sampling
    for mode, how in modes.items():
        options: Any = (families, ids, how, tokenizer.vocab_size)
        with deactivated([model]):
            base = generate(model, *options)
        ours = generate(model, *options)
        found += [
            {
                "prompt": prompt,
                "mode": mode,
                "seed": how.seed,
                "temperature": how.temperature,
                "base": tokenizer.detokenize(theirs),
                "npt": tokenizer.detokenize(mine),
                "identical": theirs == mine,
                "first_difference": _common(theirs, mine),
                "tokens": max(len(theirs), len(mine)),
                "agreeing_tokens": sum(a == b for a, b in zip(theirs, mine, strict=False)),
            }
            for prompt, theirs, mine in zip(prompts, base, ours, strict=True)
        ]
    return sorted(found, key=lambda pair: prompts.index(str(pair["prompt"])))


def greedy_agreement(generations: list[dict[str, Any]]) -> dict[str, int]:
    """Adds up the results of the greedy continuations of all prompts."""
    greedy = [pair for pair in generations if pair["mode"] == "greedy"]
    counts = ("identical", "first_difference", "tokens", "agreeing_tokens")
    return {"prompts": len(greedy)} | {key: sum(int(pair[key]) for pair in greedy) for key in counts}


def held_out_prompts(prefix: str, tokenizer: Tokenizer, *, count: int = 3, length: int = 16) -> list[str]:
    """Returns prompts for generation: the beginnings of the dataset's first documents that are longer than a prompt.

    Args:
        prefix: path of the indexed dataset without `.bin` and `.idx`.
        tokenizer: the tokenizer with which the dataset was made.
        count: number of prompts, at most.
        length: tokens per prompt.
    """
    dataset = IndexedDataset(prefix)
    prompts: list[str] = []
    for first in dataset.document_indices[:-1]:
        if len(prompts) == count:
            break
        if first < len(dataset.sequence_lengths) and dataset.sequence_lengths[first] > length:
            tokens = dataset[int(first)][:length].tolist()
            begun = tokenizer.bos is not None and tokens[0] == tokenizer.bos
            text = tokenizer.detokenize(tokens[begun:])
            if tokenizer.tokenize(text) and text not in prompts:
                prompts.append(text)
    return prompts


def _common(one: list[int], other: list[int]) -> int:
    equal = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        equal += 1
    return equal
