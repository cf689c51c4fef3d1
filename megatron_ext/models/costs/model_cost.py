"""Computes a model's parameter count, and the FLOPs per token of its matrix products.

The FLOPs of each part:

    linear layer           2 * inputs * outputs
    core attention         2 * (2 * k * n * d)        scores and weighted sum over k keys; k = min(s, w)
    layer                  linear(h, (n + 2g) d) + attention + linear(n d, h) + MLP
    forward                L * layer + linear(h, V)
    forward and backward   3 * forward                every product has two in the backward pass

Letters: L layers, h hidden, f FFN, n heads, g key/value heads, d head size, s sequence, w sliding window of the layer,
V padded vocabulary.
This is the usual 6ND (N weights, D tokens) plus attention (arXiv 2204.02311, appendix B). N counts the weights that
take part in a matrix product: always the output layer, never the word embedding's lookup. By convention, attention
counts the full s x s square (s x w with a window) although it is causal; norms, activations and softmax are not
counted. Functions with the argument `layer` take the number of a layer; for None, they return the mean over all
layers. AltUp and Laurel are counted in `gemma3n_cost`. If parts are frozen, a product has fewer gradients, and layers
may be skipped or run several times: see `step_work`. A model family reports its own part in another `ModelCost`.

Torch's `FlopCounterMode` is used only in tests, to check these formulas: it makes a step several times slower, counts
recomputation too, and misses the CPU's fused attention kernel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import padded_vocab_size
from megatron_ext.models.costs.gemma3n_cost import (
    added_to_layer,
    further_norms,
    layer_flops,
    parameters_of_end,
)
from megatron_ext.models.costs.step_work import StepWork, Use


@dataclass(frozen=True)
class ModelCost:
    """Parameters and FLOPs of the base model, or of a model family's part of the model."""

    parameters: int
    """Number of parameters of the whole model; copies on other ranks or stages are not counted."""

    forward_flops_per_token: float
    """FLOPs per token of the matrix products in one forward pass."""

    trained: int | None = None
    """Number of these parameters that are trained; None if all are."""

    training_flops: float | None = None
    """FLOPs per token of the matrix products in a training step; None for three times the forward pass."""

    trained_apart: int = 0
    """Number of the trained parameters that the model family's own optimizer trains. They have no dense gradient, and
    their state is in `FamilyActivations.state`.
    """

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return self.parameters if self.trained is None else self.trained

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs per token of the matrix products in a training step, forward and backward."""
        if self.training_flops is None:
            return 3.0 * self.forward_flops_per_token
        return self.training_flops


def model_cost(
    model: ModelConfig, vocab_size: int, tensor_parallel_size: int = 1, work: StepWork | None = None
) -> ModelCost:
    """Returns the cost of the base model.

    Args:
        model: configuration of the base model.
        vocab_size: the tokenizer's vocabulary size, before padding.
        tensor_parallel_size: determines the padding of the vocabulary.
        work: which parts a training step runs and trains; None if everything trains.
    """
    vocab = padded_vocab_size(vocab_size, model, tensor_parallel_size)
    layers = range(model.num_layers)
    parameters = sum(layer_parameters(model, layer=layer) for layer in layers)
    parameters += norm_parameters(model, model.hidden_size)
    parameters += embedding_parameters(model, vocab)
    parameters += 2 * parameters_of_end(model)
    if model.untie_embeddings_and_output_weights:
        parameters += vocab * model.hidden_size
    head = 2.0 * model.hidden_size * vocab + 4.0 * parameters_of_end(model)
    weights = [linear_flops_per_token(model, layer=layer) + layer_flops(model) for layer in layers]
    attention = [core_attention_flops_per_token(model, layer) for layer in layers]
    flops = sum(weights) + sum(attention) + head
    if work is None:
        return ModelCost(parameters, flops)
    training = sum(
        of_weights * weights[layer] + of_attention * attention[layer]
        for layer, (of_weights, of_attention) in enumerate(work.passes_of_layers)
    )
    return ModelCost(
        parameters, flops, _trained_parameters(model, vocab, work), training + work.head_passes * head
    )


def _trained_parameters(model: ModelConfig, vocab: int, work: StepWork) -> int:
    trained = [layer for layer, use in enumerate(work.layers) if use is Use.TRAINED]
    parameters = sum(layer_parameters(model, layer=layer) for layer in trained)
    if work.head is Use.TRAINED:
        parameters += norm_parameters(model, model.hidden_size)
        parameters += vocab * model.hidden_size * model.untie_embeddings_and_output_weights
    return parameters + embedding_parameters(model, vocab) * work.trains_embedding


def training_flops_per_token(costs: Iterable[ModelCost]) -> float:
    """Returns a training step's FLOPs per token as MFU counts them, without recomputation."""
    return sum(cost.training_flops_per_token for cost in costs)


def hardware_flops_per_token(
    model: ModelConfig, parallel: ParallelConfig, costs: Iterable[ModelCost]
) -> float:
    """Returns the FLOPs per token of a training step including activation recomputation.

    Assumes that a model family's part is recomputed together with its layers, and that frozen layers are recomputed
    like trained ones. The recomputation inside a fused attention kernel's backward pass is not counted.

    Args:
        model: configuration of the base model.
        parallel: specifies which activations are recomputed.
        costs: the base model's cost first, then the costs of the model families.
    """
    base, *families = costs
    again = recomputed_flops_per_token(model, parallel)
    share = recomputed_layers(model, parallel) / model.num_layers
    again += share * sum(cost.forward_flops_per_token for cost in families)
    return training_flops_per_token([base, *families]) + again


def recomputed_flops_per_token(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Returns the FLOPs per token of the base model's forward pass that the backward pass repeats."""
    if parallel.recompute_granularity == "selective":
        again = core_attention_flops_per_token(model) * ("core_attn" in parallel.recompute_modules)
        return model.num_layers * (again + mlp_flops_per_token(model) * ("mlp" in parallel.recompute_modules))
    return recomputed_layers(model, parallel) * layer_flops_per_token(model)


def recomputed_layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Returns the number of layers in the whole model whose forward pass runs twice because of full recomputation."""
    if parallel.recompute_granularity != "full":
        return 0
    if parallel.recompute_method == "uniform":
        return model.num_layers
    chunks = parallel.virtual_pipeline_size(model.num_layers) or 1
    sizes = parallel.stage_sizes(model.num_layers)
    return sum(chunks * min(parallel.recompute_num_layers or 0, size // chunks) for size in sizes)


def layer_flops_per_token(model: ModelConfig) -> float:
    """Returns a layer's forward FLOPs per token, averaged over the layers."""
    return linear_flops_per_token(model) + layer_flops(model) + core_attention_flops_per_token(model)


def core_attention_flops_per_token(model: ModelConfig, layer: int | None = None) -> float:
    """Returns the forward FLOPs per token of one layer's attention (scores, weighted sum)."""
    return 4.0 * mean_over_layers(
        model, layer, lambda one: attended_keys(model, one) * attention_width(model, one)
    )


def attended_keys(model: ModelConfig, layer: int) -> int:
    """Returns the number of keys per token in a layer's FLOPs: the sequence length, or the window if it is shorter."""
    return min(model.seq_length, model.layers[layer].window or model.seq_length)


def mlp_flops_per_token(model: ModelConfig) -> float:
    """Returns an MLP's forward FLOPs per token, averaged over the layers."""
    return linear_flops_per_token(model, "fc1", "fc2")


def linear_flops_per_token(model: ModelConfig, *names: str, layer: int | None = None) -> float:
    """Returns the forward FLOPs per token of the given linear modules of a layer, named as in `linear_sizes`.

    Without names, returns the FLOPs of all linear modules.
    """

    def weights(one: int) -> int:
        sizes = linear_sizes(model, one)
        return sum(sizes[name][0] * sizes[name][1] for name in names or sizes)

    return 2.0 * mean_over_layers(model, layer, weights)


def mean_over_layers(model: ModelConfig, layer: int | None, value: Callable[[int], float]) -> float:
    """Returns `value` of a layer; if `layer` is None, the mean over all layers."""
    if layer is not None:
        return value(layer)
    return sum(map(value, range(model.num_layers))) / model.num_layers


def linear_sizes(model: ModelConfig, layer: int = 0) -> dict[str, tuple[int, int]]:
    """Returns input and output sizes of a layer's linear modules, in the order of the forward pass."""
    hidden, ffn, width = model.hidden_size, model.layers[layer].ffn_hidden_size, attention_width(model, layer)
    return {
        "qkv": (hidden, qkv_width(model, layer)),
        "proj": (width, hidden),
        "fc1": (hidden, ffn * (1 + model.is_gated)),
        "fc2": (ffn, hidden),
    }


def layer_parameters(model: ModelConfig, tensor_parallel_size: int = 1, layer: int = 0) -> int:
    """Returns the number of parameters of one layer on one tensor-parallel rank.

    Matrices and the biases of column-parallel layers are split over the ranks; norms and the biases of row-parallel
    layers, which are added after the reduction, are on every rank.
    """
    hidden, sizes = model.hidden_size, linear_sizes(model, layer)
    shared = sum(inner * outer for inner, outer in sizes.values())
    shared += sizes["qkv"][1] * model.has_qkv_bias + sizes["fc1"][1] * model.has_mlp_bias
    replicated = (4 if model.sandwich_norm else 2) * norm_parameters(model, hidden)
    replicated += hidden * (model.has_attention_output_bias + model.has_mlp_bias)
    replicated += added_to_layer(model) + further_norms(model) * norm_parameters(model, hidden)
    shape = model.layers[layer]
    if model.qk_projection_norm:
        keys = 0 if shape.keys_of is not None else shape.num_query_groups * shape.kv_channels
        shared += attention_width(model, layer) + keys
    if model.qk_layernorm:
        replicated += (1 if shape.keys_of is not None else 2) * norm_parameters(model, shape.kv_channels)
    return shared // tensor_parallel_size + replicated


def embedding_parameters(model: ModelConfig, padded_vocab: int, tensor_parallel_size: int = 1) -> int:
    """Returns the number of parameters of the word and position embeddings on one tensor-parallel rank."""
    words = padded_vocab * model.hidden_size // tensor_parallel_size
    if model.position_embedding_type != "learned_absolute":
        return words
    return words + model.resolved_max_position_embeddings * model.hidden_size


def norm_parameters(model: ModelConfig, width: int) -> int:
    """Returns the number of parameters of one norm over `width` values."""
    return width if model.normalization == "RMSNorm" else 2 * width


def attention_width(model: ModelConfig, layer: int = 0) -> int:
    """Returns the width of all query heads of a layer together, `n * d`."""
    return model.num_attention_heads * model.layers[layer].kv_channels


def qkv_width(model: ModelConfig, layer: int = 0) -> int:
    """Returns the output width of a layer's fused query-key-value projection, usually `(n + 2g) * d`."""
    shape = model.layers[layer]
    return (model.num_attention_heads + shape.key_value_heads) * shape.kv_channels
