"""Autoregressive generation with a KV cache, in any tensor- and pipeline-parallel layout.

    p(next) = softmax(logits / temperature), restricted to the top_k most likely tokens and to the smallest set of them
    whose probabilities sum to at least top_p; temperature 0 always takes the most likely token (greedy decoding).

Prompts of different lengths share a batch. First, all prompts are processed up to the length of the shortest one in a
single forward pass; then the rest of the longer prompts is read token by token, while shorter prompts are already being
continued. Every rank takes part and returns the same tokens. There is no beam search and no continuous batching.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference import utils as engine_inference
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention

from megatron_ext.config.groups.inference_config import SamplingConfig
from megatron_ext.models.attention.extended_self_attention import ExtendedSelfAttention
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.training.interface.family_interface import (
    PRECEDING_TOKENS,
    Batch,
    Family,
    auxiliary_inputs,
)


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Settings for choosing the next token: the sampling flags, with checked values, and the tokens that end a text."""

    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the generated text."""

    def __post_init__(self) -> None:
        check_max_new_tokens(self.max_new_tokens)
        check_temperature(self.temperature)
        check_seed(self.seed)
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: must be at least 0 (0 is off)")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must lie in [0, 1]")


def check_max_new_tokens(count: int) -> None:
    """Raises `ValueError` unless 1 <= count < 2**31."""
    if not 1 <= count < 2**31:
        raise ValueError(f"--max-new-tokens {count}: must be at least 1 and below 2**31")


def check_temperature(temperature: float) -> None:
    """Raises `ValueError` unless the temperature is finite and at least 0."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature}: must be a finite number, at least 0 (0 is greedy)")


def check_seed(seed: int) -> None:
    """Raises `ValueError` unless the seed is in the range that torch's generators accept."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed}: must lie in [0, 2**63)")


@torch.no_grad()
def generate(
    model: GPTModel,
    families: list[Family],
    prompts: list[list[int]],
    sampling: Sampling,
    vocab_size: int,
    is_end: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Generates a continuation for each prompt. Collective.

    Args:
        model: this rank's only model chunk, unwrapped, without sequence parallelism.
        families: model families that the model is built with; they compute its auxiliary inputs.
        prompts: token ids of each prompt, at least one.
        sampling: how the next token is chosen.
        vocab_size: size of the tokenizer's vocabulary; ids that only pad the embedding are never chosen.
        is_end: called with a prompt's new tokens after each step; returns True to end the generation for this prompt.

    Returns:
        The new tokens for each prompt, without the stop token; equal on every rank.

    Raises:
        ValueError: a prompt is empty, or too long for the model's positions, its sliding window or the free memory.
    """
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + sampling.max_new_tokens
    if min(lengths) == 0:
        raise ValueError("a prompt has no tokens; every prompt needs at least one")
    model.check_length(
        total, f"--max-new-tokens {sampling.max_new_tokens}, after a prompt of {max(lengths)} tokens"
    )
    model.eval()
    check_cache_memory(_cache_bytes(model, len(prompts), total), sampling.max_new_tokens)
    tokens = _padded(prompts, total)
    stops = torch.tensor(sampling.stop_tokens, dtype=torch.long, device=tokens.device)
    context = StaticInferenceContext(len(prompts), total)
    generator = torch.Generator(device=tokens.device).manual_seed(sampling.seed)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    # The first pass reads positions [0, shortest prompt); each later pass reads one position.
    start, end = 0, min(lengths)
    while end < total and not bool(finished.all()):
        if (
            start == model.cache_limit
        ):  # beyond this length, the model computes different values for earlier tokens, too
            start, context = 0, StaticInferenceContext(len(prompts), total)
        inputs = tokens[:, start:end]
        positions = torch.arange(start, end, device=tokens.device).expand_as(inputs)
        batch = {"tokens": inputs, "position_ids": positions, PRECEDING_TOKENS: tokens[:, :start]}
        logits = stage_logits(model, families, batch, context)
        context.increment_sequence_len_offset(end - start)
        chosen = _chosen(logits, sampling, generator, vocab_size, len(prompts))
        # Rows whose prompt is longer keep their own next token instead of the chosen one.
        in_prompt = torch.tensor([length > end for length in lengths], device=tokens.device)
        tokens[:, end] = torch.where(in_prompt, tokens[:, end], chosen)
        finished |= ~in_prompt & torch.isin(tokens[:, end], stops)
        finished |= _is_done(tokens, lengths, end + 1, sampling.max_new_tokens, is_end)
        start, end = end, end + 1
    new = [_new_tokens(row, length, sampling) for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return new if is_end is None else [_until_end(ids, is_end) for ids in new]


def _is_done(
    tokens: torch.Tensor,
    lengths: list[int],
    end: int,
    max_new_tokens: int,
    is_end: Callable[[list[int]], bool] | None,
) -> torch.Tensor:
    """Returns a boolean [b]: True for rows that have all `max_new_tokens` new tokens before position `end`, or for
    which `is_end` returns True.
    """
    done = [end >= length + max_new_tokens for length in lengths]
    if is_end is not None:
        new = [row[length:end] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        done = [full or (bool(ids) and is_end(ids)) for full, ids in zip(done, new, strict=True)]
    return torch.tensor(done, device=tokens.device)


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Chooses the next tokens [b] from logits [b, V], by the formula at the top of this file."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator).squeeze(-1)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Returns the distribution [b, V] that the next tokens are sampled from, for a temperature above 0."""
    logits = tempered(logits, sampling.temperature)
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p:
        ordered, order = logits.sort(descending=True)
        sorted_probabilities = ordered.softmax(-1)
        # Drop a token if the more likely ones alone already reach top_p.
        dropped = sorted_probabilities.cumsum(-1) - sorted_probabilities >= sampling.top_p
        dropped[..., 0] = False  # a top_p that underflows to 0 must not drop every token
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))
    return logits.softmax(-1)


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns finite logits whose softmax equals that of `logits / temperature`, for any temperature above 0."""
    logits = logits.float()
    # Shifting the largest logit to 0 leaves the softmax unchanged and prevents overflow. Temperatures beyond 1e30 or
    # 1e-30 already give the limit (uniform or greedy).
    return (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)


def check_cache_memory(needed: int, max_new_tokens: int) -> None:
    """Raises `ValueError` if generation needs more memory than is free, because the system would then kill the
    process.
    """
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: needs about {needed / 2**30:,.1f} GiB of memory, "
            f"but {free / 2**30:,.1f} GiB are free; generate fewer tokens or use fewer prompts"
        )


def _cache_bytes(model: GPTModel, rows: int, total: int) -> int:
    """Returns the bytes needed for the tokens (8 each), this rank's key/value cache and the rotary table (fp32)."""
    config = model.config
    values = sum(_cached_values(layer.self_attention, total) for layer in model.decoder.layers)
    return rows * (8 * total + values * config.params_dtype.itemsize) + 2 * 4 * total * config.kv_channels


def _cached_values(attention: SelfAttention, total: int) -> int:
    """Returns the number of values in one layer's cache for one sequence of `total` tokens, on this rank."""
    if isinstance(attention, ExtendedSelfAttention) and not attention.key_values.keeps_cache:
        return 0
    tokens = min(total, getattr(attention.core_attention, "window", None) or total)
    return 2 * tokens * attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head


def _padded(prompts: list[list[int]], total: int) -> torch.Tensor:
    tokens = torch.zeros(len(prompts), total, dtype=torch.long, device=process_groups.device())
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens


def stage_logits(
    model: GPTModel,
    families: list[Family],
    batch: Batch,
    context: StaticInferenceContext | None = None,
) -> torch.Tensor | None:
    """Runs the pipeline stages in turn; returns logits [b, s, V] on the last stage and None on all others.

    Args:
        model: this rank's only model chunk, unwrapped, without sequence parallelism.
        families: all model families that the model is built with; they compute its auxiliary inputs.
        batch: `tokens` and `position_ids` [b, s], and the fields that the model families use.
        context: the KV cache; with a cache, only the last position's logits [b, 1, V] are computed. None: no cache.
    """
    tokens = batch["tokens"]
    group = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        hidden_size = model.config.hidden_size
        # Auxiliary streams of model families are sent between stages as additional rows of the hidden states.
        shape = (tokens.size(1) * model.auxiliary.pipeline_factor(hidden_size), len(tokens), hidden_size)
        received = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
        dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(received)
    with _inference_mode() if context is not None else contextlib.nullcontext():
        output = model(
            tokens,
            batch["position_ids"],
            None,
            auxiliary_inputs=auxiliary_inputs(families, batch),
            inference_context=context,
            runtime_gather_output=True,
        )
    if model.post_process:
        return output
    dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return None


def _inference_mode() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which the engine computes the logits of the last position only."""
    # Up to 0.17, passing a cache is enough for that. From 0.18 on, the process must also be in this mode.
    mode = getattr(engine_inference, "InferenceMode", None)
    return contextlib.nullcontext() if mode is None else mode.active()


def _chosen(
    logits: torch.Tensor | None, sampling: Sampling, generator: torch.Generator, vocab_size: int, batch: int
) -> torch.Tensor:
    """Chooses the next tokens [b] on the last pipeline stage and broadcasts them to all stages."""
    chosen = torch.empty(batch, dtype=torch.long, device=process_groups.device())
    if logits is not None:
        chosen = choose(logits[:, -1, :vocab_size], sampling, generator)
    share_from_last_stage(chosen)
    return chosen


def share_from_last_stage(tokens: torch.Tensor) -> None:
    """Broadcasts the tokens of the last pipeline stage to all stages, in place."""
    # Tensor-parallel ranks need no broadcast: they have equal logits and equal generators.
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)


def _new_tokens(row: list[int], length: int, sampling: Sampling) -> list[int]:
    new = row[length : length + sampling.max_new_tokens]
    return new[: first_of(sampling.stop_tokens, new)]


def first_of(wanted: Sequence[int], tokens: list[int]) -> int:
    """Returns the index of the first token that is in `wanted`, or the number of tokens if none is."""
    return next((place for place, token in enumerate(tokens) if token in wanted), len(tokens))


def _until_end(new: list[int], is_end: Callable[[list[int]], bool]) -> list[int]:
    """Drops the tokens that a row generated after its end, while the batch continued for other rows."""
    return next((new[:count] for count in range(1, len(new) + 1) if is_end(new[:count])), new)
