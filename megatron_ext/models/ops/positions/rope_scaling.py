"""The formulas of --rope-scaling-type for the rotary frequencies; the results equal those of transformers.

Letters: r rotated channels of a head, F the scaling factor, L the original length, `f_i = base^(-2i/r)` a frequency,
`t_i = L f_i / (2 pi)` its number of turns over the original length, `lo` and `hi` the low and high frequency factors.

    llama3    arXiv 2407.21783: f / F for t <= lo, f for t >= hi, interpolated linearly in t in between
    yarn      arXiv 2309.00071: as llama3, but interpolated linearly in i, from the last integer i with t >= hi to the
              first with t <= lo; rotated queries and keys are multiplied by `rotary_scale`
    dynamic   for a sequence of s > L tokens: f with the base multiplied by (F s / L - F + 1)^(r / (r - 2))
    longrope  arXiv 2402.13753: f / short_i in sequences up to L, f / long_i in longer ones; with `rotary_scale`
"""

import math

import torch

from megatron_ext.config.groups.model_config import ModelConfig


def rotary_scale(model: ModelConfig) -> float:
    """Returns the factor of rotated queries and keys."""
    if not model.use_rope_scaling or model.rope_scaling_type not in ("yarn", "longrope"):
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    factor = model.rope_scaling_factor
    if factor <= 1.0:
        return 1.0
    if model.rope_scaling_type == "yarn":
        return yarn_scale(factor)
    return math.sqrt(1 + math.log(factor) / math.log(model.rope_original_max_position_embeddings))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Returns YaRN's factor of rotated queries and keys; `weight` is called `mscale` in a config.json."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def depends_on_length(model: ModelConfig) -> bool:
    """Returns whether the frequencies depend on the length of the sequence."""
    return model.use_rope_scaling and model.rope_scaling_type in ("dynamic", "longrope")


def scaled(model: ModelConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Returns the frequencies [r / 2] scaled as `llama3` or `yarn`."""
    if model.rope_scaling_type == "llama3":
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        turns = model.rope_original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    else:
        kept = _kept_by_yarn(model, frequencies.numel())
    return torch.lerp(frequencies / model.rope_scaling_factor, frequencies, kept)


def _kept_by_yarn(model: ModelConfig, pairs: int) -> torch.Tensor:
    """Returns, for each frequency, the weight [r / 2] of the undivided frequency in the interpolation."""
    first = max(math.floor(_index_of(model, model.rope_high_freq_factor, pairs)), 0)
    last = min(math.ceil(_index_of(model, model.rope_low_freq_factor, pairs)), 2 * pairs - 1)
    width = last - first if last != first else 0.001
    return 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)


def _index_of(model: ModelConfig, turns: float, pairs: int) -> float:
    """Returns the (fractional) index i of the frequency that makes this number of turns over the original length."""
    length = model.rope_original_max_position_embeddings
    return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(model.rotary_base)


def frequencies_at(model: ModelConfig, lengths: torch.Tensor) -> torch.Tensor:
    """Returns the frequencies [n, r / 2] in sequences of the given lengths [n], scaled as `dynamic` or `longrope`."""
    rotated = int(model.resolved_kv_channels * model.rotary_percent)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=lengths.device) / rotated
    original, factor = model.rope_original_max_position_embeddings, model.rope_scaling_factor
    lengths = lengths.unsqueeze(1)
    if model.rope_scaling_type == "dynamic":
        growth = (factor * lengths.clamp(min=original) / original) - (factor - 1)
        return 1.0 / (model.rotary_base * growth ** (rotated / (rotated - 2))) ** exponents
    lists = (model.rope_short_factors, model.rope_long_factors)
    short, long = (torch.tensor(divisors, device=lengths.device) for divisors in lists)
    return 1.0 / (torch.where(lengths > original, long, short) * model.rotary_base**exponents)
