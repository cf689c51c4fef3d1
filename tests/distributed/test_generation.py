"""Generation with a KV cache gives what full forward passes give, at any parallel layout; sampling follows its
formula.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.generation import (
    Sampling,
    _cache_bytes,
    choose,
    generate,
    probabilities,
    stage_logits,
)
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES
from megatron_ext.training.interface.family_interface import Family

ROPE = replace(TINY, init_method_std=0.3, hidden_dropout=0.5, attention_dropout=0.5)
"""Weights large enough that the tokens differ; dropout, which must be off."""

LEARNED = replace(
    ROPE, position_embedding_type="learned_absolute", normalization="LayerNorm", num_query_groups=None
)
MODELS: dict[str, tuple[ModelConfig, bool]] = {
    "rope": (ROPE, False),
    "learned positions": (LEARNED, False),
    "per-layer embedding": (ROPE, True),
    "hashed n-grams": (ROPE, True),
    "sliding window": (replace(ROPE, window_size="3,0"), False),
    "sliding window in every other layer": (
        replace(ROPE, window_size="3,0", window_attn_skip_freq="2"),
        False,
    ),
    "shared keys": (
        replace(
            ROPE, window_size="3,0", window_attn_skip_freq="2", kv_channels_full=16, num_kv_shared_layers=2
        ),
        True,
    ),
}
GEMMA = PerLayerConfig(use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=8)
NGRAMS = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_strategy="trigram_hash",
    per_layer_vocab_size=200,
    per_layer_hidden_size=8,
)
EOD = 41
"""In a prompt, behind what the shortest prompt has: read token by token."""

PROMPTS = [[5, 17, 80], [3], [9, 9, 2, 41, 60, 7]]
GREEDY = Sampling(max_new_tokens=8, temperature=0)
SAMPLED = Sampling(max_new_tokens=8, temperature=1.3, top_k=20, top_p=0.9, seed=3)


def _build(name: str, parallel: ParallelConfig) -> tuple[GPTModel, list[Family]]:
    model, per_layer = MODELS[name]
    initialize(parallel, seed=1)
    settings = NGRAMS if name == "hashed n-grams" else GEMMA
    families: list[Family] = [PerLayerFamily(settings, VOCAB_SIZE, eod=EOD)] if per_layer else []
    extensions = [family.extension() for family in families]
    chunks = build_model(model, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    return chunks[0], families


def _by_full_passes(name: str, count: int) -> list[list[int]]:
    """Each token is the argmax of a forward pass over everything before it, without a cache."""
    model, families = _build(name, LAYOUTS["TP1"])
    model.eval()
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(count):
            batch = {"tokens": torch.tensor([tokens])}
            auxiliary_inputs = {
                key: value for family in families for key, value in family.auxiliary_inputs(batch).items()
            }
            positions = torch.arange(len(tokens)).unsqueeze(0)
            logits = model(batch["tokens"], positions, None, auxiliary_inputs=auxiliary_inputs)
            tokens.append(int(logits[0, -1, :VOCAB_SIZE].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def _generated(
    name: str, layout: str, batches: list[list[list[int]]], sampling: Sampling
) -> list[list[list[int]]]:
    model, families = _build(name, LAYOUTS[layout])
    return [generate(model, families, prompts, sampling, VOCAB_SIZE) for prompts in batches]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_the_argmax_of_full_passes(name: str) -> None:
    expected = run_single(_by_full_passes, name, GREEDY.max_new_tokens)
    assert len({token for tokens in expected for token in tokens}) > 8, "the model repeats itself"
    together, *alone = run_single(_generated, name, "TP1", [PROMPTS, *([p] for p in PROMPTS)], GREEDY)
    assert together == expected
    assert [tokens for (tokens,) in alone] == expected


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("TP2", "rope"),
        ("PP2", "rope"),
        ("TP2", "per-layer embedding"),
        ("TP2xPP2", "per-layer embedding"),
        ("TP2xPP2", "hashed n-grams"),
        ("TP2xPP2", "sliding window in every other layer"),
        ("TP2xPP2", "shared keys"),
    ],
)
def test_every_rank_of_every_layout_gives_the_same_tokens(layout: str, name: str) -> None:
    expected = run_single(_greedy_and_sampled, name, "TP1")
    for found in run_distributed(_greedy_and_sampled, WORLD_SIZES[layout], name, layout):
        assert found == expected


def _greedy_and_sampled(name: str, layout: str) -> list[list[list[int]]]:
    return [
        tokens for sampling in (GREEDY, SAMPLED) for tokens in _generated(name, layout, [PROMPTS], sampling)
    ]


def test_the_cache_of_a_layer_with_a_window_holds_no_more_keys_than_later_tokens_see() -> None:
    lengths, needed = run_single(_cached_lengths)
    # Layers 1 and 3 have a window of 4 tokens: the next token sees 3 of the earlier ones.
    assert lengths == [[3, 20, 3, 20]] * 2
    assert needed["sliding window in every other layer"] < needed["rope"]


def test_layers_that_use_keys_of_another_keep_no_cache_of_their_own() -> None:
    keys = run_single(_layers_with_cache)
    assert keys == [1, 2, "keys_and_values_of_layer_0", "keys_and_values_of_layer_1"]


def _layers_with_cache() -> list[int | str]:
    model, families = _build("shared keys", LAYOUTS["TP1"])
    context, tokens = StaticInferenceContext(1, 8), torch.tensor([[5, 6, 7]])
    batch = {"tokens": tokens, "position_ids": torch.arange(3).unsqueeze(0)}
    with torch.no_grad():
        stage_logits(model.eval(), families, batch, context)
    return sorted(context.key_value_memory_dict, key=str)


def _cached_lengths() -> tuple[list[list[int]], dict[str, int]]:
    needed = {
        name: _cache_bytes(_build(name, LAYOUTS["TP1"])[0], 2, 20)
        for name in ("rope", "sliding window in every other layer")
    }
    model, _ = _build("sliding window in every other layer", LAYOUTS["TP1"])
    model.eval()
    context, found = StaticInferenceContext(2, 20), []
    for start, end in ((0, 9), (9, 10)):
        tokens = torch.randint(0, VOCAB_SIZE, (2, end - start))
        stage_logits(
            model, [], {"tokens": tokens, "position_ids": torch.arange(start, end).expand_as(tokens)}, context
        )
        context.increment_sequence_len_offset(end - start)
        cache = context.key_value_memory_dict
        found.append([len(cache[layer][0]) for layer in sorted(cache)])
    return found, needed


def test_generation_ends_at_the_stop_token_and_leaves_it_out() -> None:
    whole = run_single(_generated, "rope", "TP1", [PROMPTS], GREEDY)[0]
    stop = whole[0][3]
    sampling = replace(GREEDY, stop_tokens=(stop,))
    found = run_single(_generated, "rope", "TP1", [PROMPTS], sampling)[0]
    assert found == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]


def test_another_seed_gives_another_continuation() -> None:
    found = [
        run_single(_generated, "rope", "TP1", [PROMPTS], replace(SAMPLED, seed=seed)) for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] != found[2]


def test_bad_requests_are_refused_in_one_line() -> None:
    no_tokens, too_long, *too_many = run_single(_refused)
    assert all(
        f"--max-new-tokens {count}:" in line for count, line in zip((2 * 10**9, 2**70), too_many, strict=True)
    )
    assert "has no tokens" in no_tokens
    assert too_long.startswith("--max-new-tokens 12, after") and "16 positions" in too_long


def _refused() -> list[str]:
    model, families = _build("learned positions", LAYOUTS["TP1"])
    found = []
    for prompts, count in (([[1], []], 2), ([[1] * 5], 12)):
        with pytest.raises(ValueError, match=r".") as error:
            generate(model, families, prompts, replace(GREEDY, max_new_tokens=count), VOCAB_SIZE)
        found.append(str(error.value))
    model, families = _build("rope", LAYOUTS["TP1"])
    for count in (2 * 10**9, 2**70):
        with pytest.raises(ValueError, match=r".") as error:
            generate(model, families, [[1]], replace(GREEDY, max_new_tokens=count), VOCAB_SIZE)
        found.append(str(error.value))
    return found


PROBABILITIES = [0.05, 0.4, 0.15, 0.1, 0.3]
DRAWS = 40_000


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=3), [1, 4, 2]),
        (Sampling(top_k=50), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.3), [1]),
        (Sampling(top_p=0.6), [1, 4]),
        (Sampling(top_p=0.75), [1, 4, 2]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        # of the three that top_k leaves, 0.4 / 0.85 and 0.3 / 0.85 reach 0.8 together
        (Sampling(top_k=3, top_p=0.8), [1, 4]),
        # p^2 / sum p^2: 0.55, 0.31, ...: the temperature comes first
        (Sampling(temperature=0.5, top_p=0.5), [1]),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else None,
)
def test_sampled_frequencies_follow_the_closed_form(sampling: Sampling, allowed: list[int]) -> None:
    weights = [p ** (1 / sampling.temperature) if i in allowed else 0.0 for i, p in enumerate(PROBABILITIES)]
    expected = [weight / math.fsum(weights) for weight in weights]
    # The logits' common shift must not matter.
    logits = torch.tensor(PROBABILITIES).log().add(5.0).expand(DRAWS, -1)
    chosen = choose(logits, sampling, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(chosen, minlength=5) / DRAWS
    for found, wanted in zip(frequencies.tolist(), expected, strict=True):
        # five standard deviations; exactly zero for what is not allowed
        assert abs(found - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / DRAWS)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.7, 1.0, 3.0, 100.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.6), (20, 0.9), (1, 0.5), (10**9, 1.0)]
)
def test_probabilities_equal_those_of_transformers_warpers(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(2)) * 4
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    found = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-20])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0)) * 100
    logits[:, 3] = -math.inf
    for top_k, top_p in ((0, 0.0), (3, 0.5), (0, 1e-50)):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(choose(logits, sampling, torch.Generator().manual_seed(1)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e38, 1e300])
def test_a_huge_temperature_makes_all_tokens_alike(temperature: float) -> None:
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * 100
    logits[:, 3] = -math.inf
    found = probabilities(logits, Sampling(temperature=temperature))
    expected = torch.full((2, 8), 1 / 7)
    expected[:, 3] = 0.0
    torch.testing.assert_close(found, expected)


def test_a_top_p_too_small_for_a_float_takes_the_most_likely_token() -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits, Sampling(top_p=1e-60), torch.Generator().manual_seed(1))
    assert torch.equal(chosen, logits.argmax(-1))


def test_rows_of_a_batch_are_restricted_each_by_its_own_logits() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 1.0, 3.0]]).repeat(500, 1)
    chosen = choose(logits, Sampling(top_k=2), torch.Generator().manual_seed(0)).view(500, 2)
    assert set(chosen[:, 0].tolist()) == {0, 2}
    assert set(chosen[:, 1].tolist()) == {1, 2}


def test_zero_temperature_takes_the_most_likely_token() -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits, GREEDY, torch.Generator())
    assert torch.equal(chosen, logits.max(dim=-1).indices)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_p": math.nan}, "--top-p nan"),
        ({"top_p": -1e-9}, "--top-p -1e-09"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
    ],
)
def test_sampling_out_of_range_names_the_flag_and_its_value(options: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        Sampling(**options)  # type: ignore[arg-type]
