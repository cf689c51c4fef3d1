#!/usr/bin/env python3
"""Generates text with a trained model, in one process or in several under `torchrun`.

A causal model generates token by token with a KV cache (greedy, temperature, top-k, top-p). With a model that was
trained on masked tokens, the continuation starts as mask tokens, which are replaced step by step, beginning with the
most confident predictions.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_ext.config.command_line.field_checks import (
    Repeated,
    check_at_least,
    flag,
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
    """Flags for the checkpoint, the prompts, the sampling and the parallel layout."""

    load: str
    """Directory of checkpoints, or the directory of one checkpoint."""

    prompt: Annotated[tuple[str, ...], flag(aliases=("--prompts",))] = ()
    """Texts to continue."""

    stop: Repeated[str] = ()
    """Text that ends a continuation and is not printed; repeat the flag for several texts."""

    stop_id: Repeated[int] = ()
    """Token id that ends a continuation, in addition to the model's own stop ids; repeat the flag for several ids."""

    prompt_file: Annotated[str | None, flag(aliases=("--prompts-file",))] = None
    """File with one prompt per line, or - for standard input (single process only)."""

    sampler: Literal["autoregressive", "diffusion"] | None = None
    """Generate token by token (autoregressive), or by replacing masks (diffusion). Default: the method that fits the
    model's training objective.
    """

    diffusion_steps: int = 32
    """With --sampler diffusion: number of forward passes that replace the masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "diffusion_steps")
        if not all(self.stop):
            raise ValueError("--stop '': must not be empty")
        if not self.prompt and self.prompt_file is None:
            raise ValueError("--prompt is missing: give --prompt or --prompt-file")


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
    from megatron_ext.registry.loaded_path import check_holds_checkpoint

    Sampling(**config.sampling_options())  # checks the values before the model is loaded
    texts = _prompts(config)
    check_holds_checkpoint("--load", config.load, config.ckpt_step)
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
    """Returns the prompt with its continuation up to the first stop text."""
    from megatron_ext.inference.stopping import cut_at_any

    kept = cut_at_any(tokenizer.detokenize(new), stops)
    if kept == tokenizer.detokenize(new):
        return tokenizer.detokenize(prompt + new)  # decoded together, because one character may span both
    return tokenizer.detokenize(prompt) + kept


def _generate(config: GenerateConfig, loaded: "LoadedModel", prompts: list[list[int]]) -> list[list[int]]:
    """Returns the new tokens of each prompt.

    Raises:
        ValueError: the model was not trained for the requested sampler, or the sampler cannot use a given flag.
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
                raise ValueError(
                    f"{flag_name(name)} {getattr(config, name)}: cannot be used with --sampler diffusion, the default "
                    "for a model that was trained on masked tokens; omit the flag"
                )
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
            "--sampler autoregressive: requires a causal model; this model was trained with "
            f"{objective.kind}, so that every token attends to all others"
        )
    sampling = Sampling(**config.sampling_options(), stop_tokens=stop_tokens)
    return generate(*arguments, sampling, tokenizer.vocab_size, ends_with_any(tokenizer, _stops(config)))


def _stops(config: GenerateConfig) -> tuple[str, ...]:
    return tuple(argument_text("--stop", text) for text in config.stop)


def _prompts(config: GenerateConfig) -> list[str]:
    texts = [argument_text("--prompt", text) for text in config.prompt]
    if config.prompt_file is not None:
        texts += read_lines("--prompt-file", config.prompt_file)
        if not texts:
            raise ValueError(f"--prompt-file {config.prompt_file}: has no prompt; write one per line")
    if not all(texts):
        raise ValueError(f"--prompt {list(config.prompt)}: a prompt must not be empty")
    return texts


if __name__ == "__main__":
    run_main(main)
