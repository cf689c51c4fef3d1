"""Generates text samples during training: greedy continuations of a prompt by the base model and by the NPT model.

Generation uses the model that is being trained, in its parallel layout, with a KV cache. Some layouts do not support
generation, such as sequence parallelism and virtual pipeline stages; with such a layout, a run with text samples is
refused before it starts.
"""

from megatron_ext.config.groups.model_config import ModelConfig, check_fits_window
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.training.interface.family_interface import Family

MAX_NEW_TOKENS = 40
"""Number of generated tokens per text sample."""


def check_samples(generation_steps: int | None, parallel: ParallelConfig) -> None:
    """Checks that the parallel layout supports text samples, if they are requested.

    Raises:
        ValueError: the layout does not support generation.
    """
    if generation_steps is None:
        return
    for flag, is_in_the_way in (
        ("--sequence-parallel", parallel.sequence_parallel),
        (
            "--num-layers-per-virtual-pipeline-stage",
            parallel.num_layers_per_virtual_pipeline_stage is not None,
        ),
        ("--context-parallel-size", parallel.context_parallel_size > 1),
        ("--overlap-param-gather", parallel.overlap_param_gather),
    ):
        if is_in_the_way:
            raise ValueError(
                f"--generation-steps {generation_steps}: not supported with {flag}; omit one of the two"
            )


def check_sample_length(prompt: str, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Checks that a text sample, including its prompt, fits into the model's sliding window.

    Raises:
        ValueError: prompt and sample together are too long.
    """
    if model.sliding_window is not None:
        length = len(tokenizer.tokenize(prompt)) + MAX_NEW_TOKENS
        check_fits_window(model.sliding_window, length, f"--generation-prompt {prompt!r}")


def paired_sample(chunk: GPTModel, families: list[Family], tokenizer: Tokenizer, prompt: str) -> str:
    """Returns the base model's and the NPT model's continuations of a prompt as Markdown, on every rank; collective.

    Args:
        chunk: this rank's only model chunk, unwrapped; its NPT layers must not be in a training step (`step` is None).
        families: the model families, which supply the model's auxiliary inputs.
        tokenizer: the run's tokenizer.
        prompt: the text to continue.

    Raises:
        ValueError: the prompt has no tokens or is too long.
    """
    tokens = tokenizer.tokenize(prompt)
    if not tokens:
        raise ValueError(f"--generation-prompt {prompt!r}: the prompt has no tokens")
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, stop_tokens=(tokenizer.eod,))
    was_training = chunk.training
    with deactivated([chunk]):
        base = generate(chunk, families, [tokenizer.begin(tokens)], sampling, tokenizer.vocab_size)[0]
    ours = generate(chunk, families, [tokenizer.begin(tokens)], sampling, tokenizer.vocab_size)[0]
    chunk.train(was_training)
    return "\n\n".join(
        f"**{name}**\n\n```\n{tokenizer.detokenize(tokens + new)}\n```"
        for name, new in (("base", base), ("npt", ours))
    )
