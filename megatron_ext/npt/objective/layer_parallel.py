"""Layer-parallel training: all NPT layers train at the same time and independently of one another.

The teacher runs once, without gradients, up to the last NPT layer; no student runs. Each layer of the teacher gives
three states: the input h, the attention output a and the MLP's output. The losses of `layer_losses` use them:

    MLP*(LN2(h)), computed from h and a     against    MLP(LN2(h + a)), known; plus a with np_residual drop

Only this MLP is in the autograd graph, and a layer's graph is freed before the next layer's graph is built. A
pipeline stage trains its own layers without exchanging anything with other stages. With `--teacher-cache-steps` the
states are kept in host memory, in bfloat16, for several passes over the same samples.
"""

from dataclasses import replace
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.teacher_inputs import state_names
from megatron_ext.npt.objective.layer_losses import LayerStepLosses
from megatron_ext.training.interface.family_interface import Batch


def train_layers(chunks: list[GPTModel], batch: Batch) -> None:
    """Computes the losses of every NPT layer on this rank, and adds their gradients.

    Args:
        chunks: this rank's model chunks, unwrapped.
        batch: a micro-batch with the teacher's states under the names of `state_names`.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            step = getattr(layer.feed_forward, "step", None)
            if isinstance(step, LayerStepLosses):
                names = state_names(layer.layer_number - 1)
                _train(layer, step, *(batch[name].to(chunk.config.params_dtype) for name in names))


def _train(
    layer: Any,
    step: LayerStepLosses,
    hidden_states: torch.Tensor,
    attention_output: torch.Tensor,
    teacher_mlp: torch.Tensor,
) -> None:
    layer.feed_forward.step = replace(step, teacher_mlp=teacher_mlp)
    try:
        output = layer.feed_forward(layer, hidden_states, lambda _: attention_output, None)
    finally:
        layer.feed_forward.step = step
    # The gradient comes only from the losses attached to the output.
    output.backward(torch.zeros_like(output))


def states_bytes(model: ModelConfig, parallel: ParallelConfig, layers: tuple[int, ...]) -> float:
    """Returns the bytes per token of the cached states, on the rank whose pipeline stage has the most NPT layers.

    Args:
        model: configuration of the base model.
        parallel: the parallel layout.
        layers: indices of the trained layers, from 0.
    """
    stages = parallel.pipeline_model_parallel_size
    chunks = stages * (parallel.virtual_pipeline_size(model.num_layers) or 1)
    size = model.num_layers // chunks
    on_stage = [sum(layer // size % stages == stage for layer in layers) for stage in range(stages)]
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return max(on_stage) * 3 * model.hidden_size * torch.bfloat16.itemsize / split
