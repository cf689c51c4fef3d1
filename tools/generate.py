#!/usr/bin/env python3
"""Generates text with a checkpoint, also under `torchrun`.

Token after token with a KV cache (greedy, temperature, top-k, top-p); or, by a model that was trained on masked tokens,
from masks that become tokens, the most confident first.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_ext.config.command_line.field_checks import (
    Repeated,
    check_at_least,
    flag_name,
)
from megatron_ext.config.command_line.flag_text import argument_text, read_lines
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.inference_config import LoadConfig, SamplingConfig

if TYPE_CHECKING:
    from megatron_ext.data.tokenizers import Tokenizer
    from megatron_ext.inference.load_model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(LoadConfig, SamplingConfig):
    """What to continue, and how tokens are chosen."""

    load: str
    """Directory of checkpoints, or one checkpoint's own."""

    prompt: tuple[str, ...] = ()
    """Texts to continue."""

    stop: Repeated[str] = ()
    """A text that ends a continuation, which is cut before it; several: the flag again for each."""

    stop_id: Repeated[int] = ()
    """A token that ends a continuation, besides the model's own end tokens; several likewise."""

    prompt_file: str | None = None
    """File with a prompt on each line; - is standard input (single process)."""

    sampler: Literal["autoregressive", "diffusion"] | None = None
    """Token after token, or from masks that become tokens. Without it the one that the model was trained for."""

    diffusion_steps: int = 32
    """diffusion: forward passes in which all masks become tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "diffusion_steps")
        if not all(self.stop):
            raise ValueError("--stop '': must not be empty")
        if not self.prompt and self.prompt_file is None:
            raise ValueError("--prompt: missing (or --prompt-file)")


def main() -> None:
    """Prints every prompt with its continuation on rank 0."""
    config: GenerateConfig = parse(
        GenerateConfig,
        prog="tools/generate.py",
        description="Continue prompts with a checkpoint.",
        example='python tools/generate.py --load runs/ckpt --prompt "def main(" --temperature 0.8 --top-p 0.9',
    )
    from megatron_ext.inference.generation import Sampling
    from megatron_ext.inference.load_model import load_model
    from megatron_ext.platform import process_groups
    from megatron_ext.registry.known_families import FAMILIES

    Sampling(**config.sampling_options())  # a mistake in these is told before the model is loaded
    texts = _prompts(config)
    loaded = load_model(
        config.load,
        FAMILIES,
        **config.load_options(),
    )
    if process_groups.rank() == 0:
        print(f"{loaded.folder}: step {loaded.step}", file=sys.stderr, flush=True)
    tokenizer = loaded.tokenizer
    prompts = [tokenizer.tokenize(text) for text in texts]
    found = _generate(config, loaded, [tokenizer.begin(prompt) for prompt in prompts])
    if process_groups.rank() == 0:
        for prompt, new in zip(prompts, found, strict=True):
            print(_shown(tokenizer, prompt, new, _stops(config)), flush=True)
            print("-" * 40, flush=True)
    process_groups.shutdown()


def _shown(tokenizer: "Tokenizer", prompt: list[int], new: list[int], stops: tuple[str, ...]) -> str:
    """The prompt with its continuation, which is cut before the first stop text."""
    from megatron_ext.inference.stopping import cut_at_any

    kept = cut_at_any(tokenizer.detokenize(new), stops)
    if kept == tokenizer.detokenize(new):
        return tokenizer.detokenize(prompt + new)  # together: a letter may lie across the two
    return tokenizer.detokenize(prompt) + kept


def _generate(config: GenerateConfig, loaded: "LoadedModel", prompts: list[list[int]]) -> list[list[int]]:
    """The new tokens of each prompt.

    Raises:
        ValueError: the model was not trained for the sampler.
    """
    from megatron_ext.inference.generation import Sampling, generate
    from megatron_ext.inference.stopping import ends_with_any
    from megatron_ext.progressive.objectives.unmasking import (
        DiffusionSampling,
        generate_by_unmasking,
        objective_of,
    )

    objective, tokenizer = objective_of(loaded.families), loaded.tokenizer
    stop_tokens = (*loaded.stop_tokens, *config.stop_id)
    arguments = loaded.model, loaded.families, prompts
    if config.sampler == "diffusion" or (config.sampler is None and objective and objective.masks_tokens):
        for name in ("top_k", "top_p"):
            if getattr(config, name):
                raise ValueError(f"{flag_name(name)} {getattr(config, name)}: is not for --sampler diffusion")
        unmasking = DiffusionSampling(
            max_new_tokens=config.max_new_tokens,
            steps=config.diffusion_steps,
            temperature=config.temperature,
            seed=config.seed,
            stop_tokens=stop_tokens,
        )
        return generate_by_unmasking(*arguments, unmasking, tokenizer.vocab_size)
    if objective is not None and objective.bidirectional:
        raise ValueError(
            f"--sampler autoregressive: the model was trained for {objective.kind}, where every token sees all others"
        )
    sampling = Sampling(**config.sampling_options(), stop_tokens=stop_tokens)
    return generate(*arguments, sampling, tokenizer.vocab_size, ends_with_any(tokenizer, _stops(config)))


def _stops(config: GenerateConfig) -> tuple[str, ...]:
    return tuple(argument_text("--stop", text) for text in config.stop)


def _prompts(config: GenerateConfig) -> list[str]:
    texts = [argument_text("--prompt", text) for text in config.prompt]
    if config.prompt_file is not None:
        texts += read_lines("--prompt-file", config.prompt_file)
    if not all(texts) or not texts:
        raise ValueError(f"--prompt {list(config.prompt)}: a prompt must not be empty")
    return texts


if __name__ == "__main__":
    run_main(main)
