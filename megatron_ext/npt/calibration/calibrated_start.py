"""Calibrates the NP weights of a run (`--np-init-strategy calibrated`), and stores the result in the run's directory.

    {save}/calibrated/npt_weights.pt, .safetensors, config.json     NP weights, as in `final/`, with the chosen ranks
    {save}/calibrated/spectrum.json                                 each layer's ranks and squared singular values

At the end, the directory is written under another name and then renamed, so a killed calibration leaves no files. A
repeated command reuses the directory if the base model, the data and the settings are the same. Apart from rounding,
the result does not depend on the parallel layout.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import layer_parameters
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.norm import full_weight
from megatron_ext.npt.calibration.document_forms import calibrate_form
from megatron_ext.npt.calibration.factors import DOWN, FC1, Place, Spectrum, choose_ranks, decompose, place_of
from megatron_ext.npt.calibration.moments import LayerMoments, collect_moments
from megatron_ext.npt.modules.np_ranks import Limit, described, format_ranks, limit
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.vector_norms import target_weight
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.weights.np_factors import sorted_by_layer
from megatron_ext.npt.weights.np_weight_files import CONFIG, WEIGHTS, read_np_settings
from megatron_ext.npt.weights.state_files import replace_final
from megatron_ext.platform.collectives import merge_over_ranks, on_first_rank, print_on_first_rank
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.loop import Data
from megatron_ext.training.pretrain import run_configuration
from megatron_ext.training.run_data import build_data
from megatron_ext.training.run_options import RunOptions

FOLDER, SPECTRUM = "calibrated", "spectrum.json"
_FORMAT = "megatron_ext.npt_spectrum/1"


def calibrated_start(config: NPTRunConfig, base: BaseCheckpoint, tokenizer: Tokenizer) -> Path:
    """Calibrates, unless an earlier start of the run has already done so; returns the path of the NP weights.
    Collective.

    Args:
        config: the run's configuration, resolved, with --save and with layers as numbers.
        base: the base model.
        tokenizer: the tokenizer of the training data.

    Raises:
        ValueError: the ranks do not fit the model, or the data is unsuitable.
        OSError: a file could not be read or written.
    """
    assert config.checkpoint.save is not None
    folder, of_what = Path(config.checkpoint.save) / FOLDER, _description(config, base)
    if on_first_rank(lambda: _is_of(folder, of_what)):
        print_on_first_rank(f"calibration: reusing {folder}, from an earlier start of this run")
        return folder / WEIGHTS
    chunks = _base_model(config, base, tokenizer)
    data = _data(config, tokenizer)
    settings, spectra = _with_ranks(config, chunks, _moments(config, chunks, data))
    if settings.np_form == "key_value":
        factors, found = _factors(spectra), _found(spectra)
    else:
        factors, errors = calibrate_form(chunks, settings, spectra, lambda: data.train(0), _samples(config))
        found = _found_by_target(spectra, errors)
    group = parallel_state.get_pipeline_model_parallel_group()
    tensors = sorted_by_layer(merge_over_ranks(factors, group))
    report = _report(config, settings, merge_over_ranks(found, group))
    more = {"calibration": of_what}
    texts = {SPECTRUM: json.dumps(report, indent=1)}
    on_first_rank(lambda: replace_final(folder.parent, tensors, settings, more, name=FOLDER, texts=texts))
    _print_report(report, settings)
    return folder / WEIGHTS


def _description(config: NPTRunConfig, base: BaseCheckpoint) -> dict[str, Any]:
    """Returns everything that determines the calibrated weights, as JSON values; stored weights with another
    description are not used.
    """
    training = config.npt
    return {
        "factors": "A [h, r], B [r, h]",  # part of the description, because an earlier version wrote B as [r, output]
        "np": group_to_dict(config.np),
        "tokens": training.calibration_tokens,
        "metric": training.calibration_metric,
        "seed": config.training.seed,
        "sequence_length": config.model.seq_length,
        "data": group_to_dict(config.data),
        "bf16": config.training.bf16,
        "base_sha256": base.sha256,
    }


def _is_of(folder: Path, of_what: Mapping[str, Any]) -> bool:
    file = folder / CONFIG
    return file.is_file() and files.read_json(file).get("calibration") == of_what


def _base_model(config: NPTRunConfig, base: BaseCheckpoint, tokenizer: Tokenizer) -> list[GPTModel]:
    run_config = {**run_configuration(config, tokenizer), "families": {}}
    tokenizer.begin_as(run_config[files.BEGIN])
    chunks = build_model(
        config.model,
        _without_recomputation(config.parallel),
        vocab_size=run_config["vocab_size"],
        seed=config.training.seed,
        precision=config.training.precision,
    )
    base.load(chunks, run_config, [])
    return chunks


def _without_recomputation(parallel: ParallelConfig) -> ParallelConfig:
    # A recomputed layer would run twice, and so would its hooks.
    defaults = ParallelConfig()
    names = [name for name in ParallelConfig.__dataclass_fields__ if name.startswith("recompute_")]
    return replace(parallel, **{name: getattr(defaults, name) for name in names})


def _data(config: NPTRunConfig, tokenizer: Tokenizer) -> Data:
    samples = _samples(config)
    quiet = replace(config, training=replace(config.training, eval_iters=0))
    copies = parallel_state.get_data_parallel_world_size()
    data = build_data(
        quiet,
        tokenizer,
        [],
        config.training.resolved_global_batch_size(copies),
        RunOptions(samples=samples),
    )
    print_on_first_rank(f"calibrating on {samples * config.model.seq_length:,} tokens")
    return data


def _moments(config: NPTRunConfig, chunks: list[GPTModel], data: Data) -> dict[int, LayerMoments]:
    return collect_moments(
        chunks,
        config.np.layers(config.model.num_layers),
        data.train(0),
        _samples(config),
        gradients=config.npt.calibration_metric == "fisher",
        seed=config.training.seed,
        name="calibration" if config.np.np_form == "key_value" else "calibration, pass 1 of 3",
    )


def _samples(config: NPTRunConfig) -> int:
    return math.ceil(config.npt.calibration_tokens / config.model.seq_length)


def _with_ranks(
    config: NPTRunConfig, chunks: list[GPTModel], moments: dict[int, LayerMoments]
) -> tuple[NPTModuleConfig, dict[Place, tuple[Spectrum, int]]]:
    """Returns the settings with the chosen ranks, and spectrum and rank of each (layer, target) of the stage."""
    settings, model = config.np, config.model
    spectra: dict[Place, Spectrum] = {}
    for layer in chain.from_iterable(chunk.decoder.layers for chunk in chunks):
        number = layer.layer_number - 1
        of_layer = moments.pop(number, None)  # free the moments of this layer
        if of_layer is not None:
            spectra |= {
                (number, target): found for target, found in _spectra(config, layer, of_layer).items()
            }
    layers = settings.layers(model.num_layers)
    allowed = limit(settings.np_rank)
    if allowed is None:
        ranks = _given_ranks(settings, model.num_layers, model.hidden_size)
    else:
        local = {place: _gains(config, found) for place, found in spectra.items()}
        gains = merge_over_ranks(local, parallel_state.get_pipeline_model_parallel_group())
        ranks = _chosen_ranks(config, allowed, gains)
    text = format_ranks((ranks[n, FC1], ranks.get((n, DOWN), ranks[n, FC1])) for n in layers)
    return replace(settings, np_rank=text), {place: (found, ranks[place]) for place, found in spectra.items()}


def _chosen_ranks(
    config: NPTRunConfig, allowed: Limit, gains: Mapping[Place, list[float]]
) -> dict[Place, int]:
    model = config.model
    if allowed.kl is not None:
        # The gain of a rank is twice the KL per token that the rank removes; see `moments`.
        return choose_ranks(gains, error=2 * allowed.kl)
    assert allowed.share is not None
    layers, cost = len(config.np.layers(model.num_layers)), 2 * model.hidden_size
    parameters = allowed.share * layer_parameters(model) * layers
    if parameters < cost * len(gains):
        raise ValueError(
            f"--np-rank {config.np.np_rank}: the budget is {parameters:,.0f} parameters, but rank 1 "
            f"everywhere needs {cost * len(gains):,}; give a larger share"
        )
    return choose_ranks(gains, total=int(parameters // cost))


def _given_ranks(settings: NPTModuleConfig, num_layers: int, hidden_size: int) -> dict[Place, int]:
    ranks = {
        place_of(layer, target): settings.rank(layer, target, num_layers)
        for layer in settings.layers(num_layers)
        for target in settings.targets
    }
    components = settings.num_np_components
    if components * max(ranks.values()) > hidden_size:
        most = max(ranks.values())
        rank = f"rank times components, {most} x {components}," if components > 1 else "the rank"
        raise ValueError(
            f"--np-rank {settings.np_rank}: for a calibrated start, {rank} must be at most the hidden size "
            f"{hidden_size}"
        )
    return ranks


def _gains(config: NPTRunConfig, found: Spectrum) -> list[float]:
    """Returns the gain of each further rank: the reduction of the loss or, without gradients, of the relative
    error.
    """
    squares = found.squares
    if config.npt.calibration_metric == "output":
        # Absolute errors of different layers are not comparable without gradients; errors relative to the layer's
        # output are.
        squares = squares / squares.sum()
    gains: list[float] = squares.tolist()
    return gains


def _spectra(config: NPTRunConfig, layer: Any, moments: LayerMoments) -> dict[str, Spectrum]:
    fisher = config.npt.calibration_metric == "fisher"
    metric = moments.metric if fisher else _output_metric(layer)
    spectra = {FC1: decompose(moments.inputs, metric)}
    if DOWN in config.np.targets:
        residual = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        spectra[DOWN] = decompose(moments.attention, moments.output if fisher else residual)
    return spectra


def _output_metric(layer: Any) -> torch.Tensor:
    """Returns diag(g) W^T W diag(g), summed over tensor-parallel ranks; [h, h] in fp64."""
    scale = full_weight(layer.pre_mlp_layernorm).detach().double()
    weight = target_weight(FC1, layer.mlp).detach().double() * scale
    metric = weight.t() @ weight
    dist.all_reduce(metric, group=layer.pg_collection.tp)
    return metric


def _factors(spectra: Mapping[Place, tuple[Spectrum, int]]) -> dict[str, torch.Tensor]:
    """Returns the NP factors of key_value for this stage's layers, in fp32 on the CPU."""
    return {
        f"layer_{number}_np.{target}.{name}": value.float().cpu().contiguous()
        for (number, target), (found, rank) in spectra.items()
        for name, value in zip("AB", found.factors(rank), strict=True)
    }


def _found(spectra: Mapping[Place, tuple[Spectrum, int]]) -> dict[Place, dict[str, Any]]:
    """Returns the report's entries for key_value, one for each layer and target; `error_left` is measured in the
    calibration's metric.
    """
    return {
        place: _entry(found, rank, float(found.squares[rank:].sum() / found.squares.sum()))
        for place, (found, rank) in spectra.items()
    }


def _found_by_target(
    spectra: Mapping[Place, tuple[Spectrum, int]],
    errors: Mapping[tuple[int, str], float],
) -> dict[Place, dict[str, Any]]:
    """Returns the report's entries for low_rank and outer_product, one for each layer and target."""
    return {
        (number, target): _entry(*spectra[place_of(number, target)], error)
        for (number, target), error in errors.items()
    }


def _entry(found: Spectrum, rank: int, error_left: float) -> dict[str, Any]:
    return {"rank": rank, "error_left": error_left, "squared_singular_values": found.squares.tolist()}


def _report(
    config: NPTRunConfig, settings: NPTModuleConfig, found: Mapping[Place, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the content of `spectrum.json` from the entries of all targets of all stages."""
    layers: dict[str, dict[str, Any]] = {}
    for (number, target), values in sorted(found.items()):
        layers.setdefault(str(number), {})[target] = values
    return {
        "format": _FORMAT,
        "metric": config.npt.calibration_metric,
        "tokens": _samples(config) * config.model.seq_length,
        "np_rank": settings.np_rank,
        "layers": layers,
    }


def _print_report(report: Mapping[str, Any], settings: NPTModuleConfig) -> None:
    predicts_kl = settings.np_form == "key_value" and report["metric"] == "fisher"
    of_what = (
        "predicted KL of a layer without deltas"
        if predicts_kl
        else "square of the values that the deltas should add"
    )
    print_on_first_rank(f"rank of each layer, and the error that is left, as a fraction of the {of_what}:")
    for number, targets in report["layers"].items():
        parts = [
            f"{name} rank {found['rank']}, {found['error_left']:.2%} left"
            for name, found in _named_entries(targets, settings)
        ]
        print_on_first_rank(f"  layer {number}: {'; '.join(parts)}")
    print_on_first_rank(f"calibrated: rank {described(settings.np_rank)}")


def _named_entries(
    targets: Mapping[str, Mapping[str, Any]], settings: NPTModuleConfig
) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns one layer's entries, each with the name of its target for messages; gate and up, whose values are equal,
    are one entry.
    """
    of_fc1 = next(found for target, found in targets.items() if target != DOWN)
    entries = [of_fc1, *(found for target, found in targets.items() if target == DOWN)]
    # low_rank and outer_product have no entry for `down` if the residual is kept.
    return list(zip(settings.named_targets, entries, strict=False))


def chosen_settings(weights: Path, requested: NPTModuleConfig) -> NPTModuleConfig:
    """Returns the requested settings with the ranks of the calibrated weights, on every rank; collective."""
    found = on_first_rank(lambda: read_np_settings(str(weights)))
    assert found is not None, "the calibration has written the settings beside the weights"
    return replace(requested, np_rank=found.np_rank)
