"""Computes statistics of per-layer embedding (PLE) in every layer.

Their TensorBoard tags are `per-layer/{name}/layer_{number}`, where layers are numbered from 00. The names are listed
below; those in the lines scaled_add, concat and gated exist only with that combination method:

    embedding-norm              Frobenius norm of the layer's table
    gate-activation-mean, -std  mean and standard deviation of act(W_gate x), over tokens and p
    update-ratio                |update| / |residual stream|, over all tokens of the step
    scaled_add                  combination-context-rms, combination-token-rms: root mean squares of the two parts of c;
                                combination-token-share: share of the token's part in the sum of their squares
    concat                      combination-context-norm, combination-token-norm: norms of W_cat's two halves
    gated                       combination-gate-mean, -std: mean and standard deviation of g, the token's weight
    embedding-gradient-norm     norm of the table's gradient
    gradient-norm               norm of the gradient of all the layer's PLE parameters

`--log-per-layer-gradients` writes the last two, `--log-per-layer-stats` the others. Every value is global: the ranks'
contributions to one matrix [quantity, layer] are summed over all ranks. A quantity that is equal on several ranks is
first divided by the number of these ranks.
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_block import PerLayerBlock
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_inputs import PerLayerInputs, stage_module
from megatron_ext.per_layer.statistics_recorder import Recorder
from megatron_ext.platform import process_groups
from megatron_ext.platform.memory.mapped_tensors import release_pages
from megatron_ext.training.engine.gradient_norms import gradient_square_sum

_RECORDED = (
    "gate_activation_sum",
    "gate_activation_squares",
    "gate_activation_count",
    "update_squares",
    "residual_squares",
    "combination_context_squares",
    "combination_token_squares",
    "combination_gate_sum",
    "combination_gate_squares",
    "combination_gate_count",
)
_QUANTITIES = (
    *_RECORDED,
    "embedding_squares",
    "embedding_gradient_squares",
    "gradient_squares",
)


def start_recording(chunks: list[GPTModel]) -> None:
    """Makes PLE's modules record their statistics until `stop_recording`."""
    for module in _modules(chunks):
        module.recorder = Recorder()


def stop_recording(chunks: list[GPTModel], settings: PerLayerConfig) -> dict[str, float]:
    """Returns the recorded statistics by TensorBoard tag. Collective; call it between the backward pass and the
    update.
    """
    num_layers = chunks[0].config.num_layers
    device = process_groups.device()
    sums = {name: torch.zeros(num_layers, dtype=torch.float64, device=device) for name in _QUANTITIES}
    for chunk in chunks:
        _add_inputs(sums, chunk)
    for module in _modules(chunks):
        if isinstance(module, PerLayerBlock):
            _add_block(sums, module, settings)
        module.recorder = None
    matrix = torch.stack([sums[name] for name in _QUANTITIES])
    dist.all_reduce(matrix)
    rows = dict(zip(_QUANTITIES, matrix.tolist(), strict=True))
    values: dict[str, float] = {}
    for layer in range(num_layers):
        of_layer = {name: row[layer] for name, row in rows.items()}
        for name, value in _derived(of_layer, settings).items():
            values[f"per-layer/{name}/layer_{layer:02d}"] = value
    return values


def _modules(chunks: list[GPTModel]) -> list[PerLayerBlock | PerLayerInputs]:
    kinds = (PerLayerBlock, PerLayerInputs)
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, kinds)]


def _add_inputs(sums: dict[str, torch.Tensor], chunk: GPTModel) -> None:
    inputs = stage_module(chunk)
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for name, value in inputs.recorder.sums.items() if inputs.recorder is not None else ():
        sums[name][list(chunk.stage.layer_numbers)] += value
    for number, layer in zip(chunk.stage.layer_numbers, inputs.weights(), strict=True):
        table = layer.embedding.weight
        sums["embedding_squares"][number] += _square_sum(table) / copies
        sums["embedding_gradient_squares"][number] += gradient_square_sum(table)
        for parameter in layer.parameters():
            sums["gradient_squares"][number] += gradient_square_sum(parameter)
        if inputs.settings.per_layer_combination_method == "concat":
            context, token = layer.combination.weight.detach().chunk(2, dim=1)
            sums["combination_context_squares"][number] += _square_sum(context) / copies
            sums["combination_token_squares"][number] += _square_sum(token) / copies


def _add_block(sums: dict[str, torch.Tensor], block: PerLayerBlock, settings: PerLayerConfig) -> None:
    number = block.layer_number - 1
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, value in block.recorder.sums.items() if block.recorder is not None else ():
        # The residual stream and its update are equal on all tensor-parallel ranks, except under sequence parallelism,
        # where each rank has its own rows.
        alike = name in ("update_squares", "residual_squares") and not block.config.sequence_parallel
        sums[name][number] += value.squeeze(0) / (ranks if alike else 1)
    for parameter in block.parameters():
        is_shard = getattr(parameter, "tensor_model_parallel", False)
        sums["gradient_squares"][number] += gradient_square_sum(parameter) / (1 if is_shard else ranks)


def _derived(sums: dict[str, float], settings: PerLayerConfig) -> dict[str, float]:
    values: dict[str, float] = {}
    if settings.log_per_layer_stats:
        values["embedding-norm"] = math.sqrt(sums["embedding_squares"])
        values["gate-activation-mean"], values["gate-activation-std"] = _mean_and_std(sums, "gate_activation")
        values["update-ratio"] = math.sqrt(sums["update_squares"] / sums["residual_squares"])
        values |= _combination(sums, settings.per_layer_combination_method)
    if settings.log_per_layer_gradients:
        values["embedding-gradient-norm"] = math.sqrt(sums["embedding_gradient_squares"])
        values["gradient-norm"] = math.sqrt(sums["gradient_squares"])
    return values


def _combination(sums: dict[str, float], method: str) -> dict[str, float]:
    context, token = sums["combination_context_squares"], sums["combination_token_squares"]
    if method == "concat":
        return {
            "combination-context-norm": math.sqrt(context),
            "combination-token-norm": math.sqrt(token),
        }
    if method == "gated":
        mean, std = _mean_and_std(sums, "combination_gate")
        return {"combination-gate-mean": mean, "combination-gate-std": std}
    count = sums["gate_activation_count"]
    return {
        "combination-context-rms": math.sqrt(context / count),
        "combination-token-rms": math.sqrt(token / count),
        "combination-token-share": token / (context + token),
    }


def _mean_and_std(sums: dict[str, float], name: str) -> tuple[float, float]:
    count = sums[f"{name}_count"]
    mean = sums[f"{name}_sum"] / count
    return mean, math.sqrt(max(0.0, sums[f"{name}_squares"] / count - mean**2))


def _square_sum(weight: torch.Tensor) -> torch.Tensor:
    # The sum is computed block by block, because a table may be larger than memory.
    blocks = [
        block.float().square().sum(dtype=torch.float64) for block in _released(weight.detach().split(1 << 14))
    ]
    return torch.stack(blocks).sum()


def _released(blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for block in blocks:
        yield block
        release_pages()
