"""Evaluates an NPT model against its base model; the report is a dictionary of JSON values.

docs/npt_evaluation.md describes every key of the report. Some of the keys:

    perplexity_ratio    perplexity of the NPT model divided by that of the base model, on the same tokens
    relative_error      |NPT output - base output|_F / |base output|_F of a layer
    update_relative_error  |NPT output - base output|_F / |base output - base input|_F of a layer

Most of a layer's output is the residual stream, so a layer that does nothing has a small relative_error; but its
update_relative_error is 1. Values that are not finite become null. Any tensor-, pipeline- and data-parallel layout is
supported; rank 0 gets the report.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.inference.perplexity import Begin, ReportTokens, held_out_steps
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.evaluation.distribution import distribution
from megatron_ext.npt.evaluation.layer_comparison import (
    FREE_RUNNING,
    SAME_INPUT,
    Findings,
    add_to,
    compare_layers,
)
from megatron_ext.npt.evaluation.layer_errors import MASSIVE, layer_errors
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.vector_norms import weight_norm
from megatron_ext.training.interface.family_interface import Family

FORMAT = "megatron_ext.npt_evaluation/1"
DELTA_THRESHOLD = 0.01
"""Expected upper limit of the deltas' average Frobenius norm, from docs/design/npt_equivalence.md."""
RATIO_TOLERANCE = 0.05
"""Expected largest difference of the perplexity ratio from 1, from docs/design/npt_equivalence.md."""

_MODES = {
    SAME_INPUT: "teacher-forced: both the NPT layer and the base layer get the layer's input in the base model",
    FREE_RUNNING: "free-running: hidden states after the layer, in the NPT model's own run and in the base model's",
}


def evaluate_npt(
    chunks: list[GPTModel],
    families: list[Family],
    settings: NPTModuleConfig,
    prefix: str,
    *,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    begin: Begin | None = None,
    progress: ReportTokens = lambda tokens: None,
) -> dict[str, Any] | None:
    """Compares the NPT model with its base model on held-out data; collective.

    Args:
        chunks: this rank's model chunks, unwrapped, built with NP components and without sequence parallelism.
        families: the model families, which supply the model's auxiliary inputs.
        settings: the configuration of the NP components.
        prefix: path of the held-out indexed dataset without `.bin` and `.idx`; already checked.
        sequence_length: tokens per window.
        micro_batch_size: windows per forward pass.
        max_tokens: number of tokens to use, from the dataset's beginning; None for all.
        begin: the token that every window begins with, or None.
        progress: called after every micro-batch with its number of tokens on all ranks.

    Returns:
        On rank 0 the report, without generated texts; None on other ranks.

    Raises:
        ValueError: the dataset has fewer than two tokens.
    """
    for chunk in chunks:
        chunk.eval()
    steps = held_out_steps(prefix, sequence_length, micro_batch_size, max_tokens, begin, progress)
    findings = compare_layers(chunks, families, steps)
    sizes, norms = _parameters(chunks), _weight_norms(chunks)
    # All ranks of a tensor-parallel group have the same findings, so only one rank of each group sends them.
    speaks = parallel_state.get_tensor_model_parallel_rank() == 0
    gathered = _gather((findings, sizes, norms) if speaks else None)
    if gathered is None:
        return None
    found = _merged([part[0] for part in gathered])
    stage_sizes = {number: size for part in gathered for number, size in part[1].items()}
    return finite(
        {
            "format": FORMAT,
            "npt_config": asdict(settings),
            **_output(found),
            "layer_wise_equivalence": {
                how: _layers(found, how, chunks[0].config.hidden_size) for how in (SAME_INPUT, FREE_RUNNING)
            },
            "mlp_error": {"massive_above": MASSIVE, "layers": layer_errors(found.errors)},
            "weight_delta": _deltas(found, {key: norm for part in gathered for key, norm in part[2].items()}),
            "generated_vectors": _vectors(found),
            "parameters": _counts(stage_sizes),
        }
    )


def untrained_figures(loss: float, base_loss: float | None, seed: int | None) -> dict[str, Any]:
    """Returns the report's figures for the model with untrained NP components, as a reference for the perplexity ratio.

    Args:
        loss: loss of the model with initial NP components or without deltas, on the same tokens.
        base_loss: loss of the base model, from the report.
        seed: seed of the initial values; None for a model without deltas.
    """
    ratio = math.nan if base_loss is None else _exp(loss - base_loss)
    return dict(
        finite(
            {
                "untrained": _exp(loss),
                "untrained_ratio": ratio,
                "untrained_loss": loss,
                "untrained_seed": seed,
            }
        )
    )


def finite(value: Any) -> Any:
    """Returns `value` for JSON: numbers that are not finite become None, and keys become strings."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _gather(part: Any) -> list[Any] | None:
    """Returns, on rank 0, those parts of all ranks that are not None; on other ranks, returns None."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, gathered, dst=0)
    return None if gathered is None else [found for found in gathered if found is not None]


def _merged(parts: list[Findings]) -> Findings:
    whole = Findings()
    for part in parts:
        whole.output = whole.output + part.output
        for of_layer, sums in part.layers.items():
            add_to(whole.layers, of_layer, sums)
        for of_target, sums in part.vectors.items():
            add_to(whole.vectors, of_target, sums)
        for place, norms in part.deltas.items():
            whole.deltas.setdefault(place, []).extend(norms)
        for number, squares in part.errors.items():
            whole.errors.setdefault(number, []).extend(squares)
    return whole


def _output(found: Findings) -> dict[str, Any]:
    tokens, base, ours, kl = found.output.tolist()
    ratio = _exp((ours - base) / tokens)
    return {
        "perplexity": {
            "base": _exp(base / tokens),
            "npt": _exp(ours / tokens),
            "perplexity_ratio": ratio,
            "base_loss": base / tokens,
            "npt_loss": ours / tokens,
            "tokens": int(tokens),
            "expected_within": RATIO_TOLERANCE,
            "as_expected": abs(ratio - 1) <= RATIO_TOLERANCE,
        },
        "logit_kl": {"mean": kl / tokens},
    }


def _layers(found: Findings, how: str, width: int) -> dict[str, Any]:
    layers = {}
    for (kind, number), sums in sorted(found.layers.items()):
        if kind != how:
            continue
        tokens, error, cosine, output, update = sums.tolist()
        layers[number] = {
            "mse": error / (tokens * width),
            "cosine_similarity": cosine / tokens,
            "relative_error": _root_of_ratio(error, output),
            "update_relative_error": _root_of_ratio(error, update),
        }
    return {"measured": _MODES[how], "layers": layers}


def _deltas(found: Findings, norms: dict[tuple[int, str], float]) -> dict[str, Any]:
    layers: dict[int, dict[str, Any]] = {}
    values = {place: np.concatenate(parts) for place, parts in sorted(found.deltas.items())}
    relative = {place: value / norms[place] for place, value in values.items()}
    for (number, target), value in values.items():
        layers.setdefault(number, {})[target] = {
            "frobenius_norm": distribution(value, histogram=True),
            "relative_norm": distribution(relative[number, target]),
            "weight_norm": norms[number, target],
        }
    nothing = np.zeros(0)  # `concatenate` needs at least one array, even if all layers are inactive
    overall = distribution(np.concatenate([nothing, *values.values()]), histogram=True)
    average = overall["mean"]
    return {
        "average_frobenius_norm": average,
        "expected_below": DELTA_THRESHOLD,
        "as_expected": average is not None and average < DELTA_THRESHOLD,
        "frobenius_norm": overall,
        "relative_norm": distribution(np.concatenate([nothing, *relative.values()]), histogram=True),
        "layers": layers,
    }


def _vectors(found: Findings) -> dict[str, Any] | None:
    layers: dict[int, dict[str, Any]] = {}
    for (number, target), sums in sorted(found.vectors.items()):
        names = ("v_a_norm", "v_b_norm", "v_a_attention_similarity")
        layers.setdefault(number, {})[target] = dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True))
    return {"layers": layers} if layers else None


def _counts(sizes: dict[int, tuple[int, int]]) -> dict[str, Any]:
    ours, layers = (sum(column) for column in zip(*sizes.values(), strict=True))
    return {
        "np": ours,
        "converted_layers": layers,
        "np_share_of_converted_layers": ours / layers,
        "layers": {number: {"np": own, "layer": layer} for number, (own, layer) in sorted(sizes.items())},
    }


def _parameters(chunks: list[GPTModel]) -> dict[int, tuple[int, int]]:
    """Returns the numbers of NP parameters and of base parameters of each NPT layer, over all tensor-parallel ranks."""
    sizes: dict[int, tuple[int, int]] = {}
    for layer in _npt_layers(chunks):
        counted = {"np": 0, "layer": 0}
        for name, parameter in layer.named_parameters():
            is_split = getattr(parameter, "tensor_model_parallel", False)
            ranks = layer.feed_forward.tp_group.size() if is_split else 1
            counted["np" if name.startswith("feed_forward.") else "layer"] += parameter.numel() * ranks
        sizes[layer.layer_number - 1] = counted["np"], counted["layer"]
    return sizes


def _weight_norms(chunks: list[GPTModel]) -> dict[tuple[int, str], float]:
    return {
        (layer.layer_number - 1, target): float(weight_norm(part, layer.mlp))
        for layer in _npt_layers(chunks)
        for target, part in layer.feed_forward.modulations.items()
    }


def _npt_layers(chunks: list[GPTModel]) -> list[Any]:
    return [
        layer
        for chunk in chunks
        for layer in chunk.decoder.layers
        if isinstance(layer.feed_forward, NPFeedForward)
    ]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _root_of_ratio(above: float, below: float) -> float:
    return math.sqrt(above / below) if below else math.nan if above else 0.0
