"""Maps the names of a GPT model's tensors between this package's checkpoints and Megatron-LM's.

    here                                         Megatron-LM
    decoder.layers.{i}.self_attention...         decoder.layers.self_attention... [L, ...], or numbered as here
    decoder.layers.{i}.input_layernorm.weight    decoder.layers.self_attention.linear_qkv.layer_norm_weight
    decoder.layers.{i}.pre_mlp_layernorm.weight  decoder.layers.mlp.linear_fc1.layer_norm_weight

Megatron-LM joins the same tensor of all L layers into one tensor, unless the layers differ. The names of norms depend
on the modules: Transformer Engine's linear layers contain the norm before them, and otherwise the names are as here.
Outside of the layers, names and shapes are equal. The order of rows is equal everywhere, because both programs use
megatron-core's modules.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_ext.config.groups.model_config import ModelConfig

Shape = tuple[int, ...]

_LAYERS = "decoder.layers."
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Named:
    """One tensor of a model, and where it is in a Megatron-LM checkpoint."""

    name: str
    """Name in a checkpoint of this package."""

    shape: Shape
    """Unsharded shape."""

    theirs: str
    """Name in the Megatron-LM checkpoint."""

    layer: int | None
    """Index in the tensor of all layers; None if the tensor is stored alone."""


def find_tensors(model: ModelConfig, rows: int, stored: Collection[str], source: str) -> list[Named]:
    """Finds a model's tensors in a Megatron-LM checkpoint.

    Args:
        model: configuration of the model.
        rows: number of rows of the word embedding.
        stored: names of all tensors in the checkpoint.
        source: the checkpoint's directory, for error messages.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model, or has a tensor that the model lacks.
    """
    found = []
    for name, shape in model_tensors(model, rows):
        choices = list(_their_names(name))
        fitting = [choice for choice in choices if choice[0] in stored]
        if not fitting:
            raise ValueError(f"{source}: contains no tensor {choices[0][0]}, which its arguments require")
        theirs, layer = fitting[0]
        found.append(Named(name, shape, theirs, layer))
    known = {tensor.theirs for tensor in found}
    extra = sorted(name for name in stored if name not in known and not _is_no_model_tensor(name))
    if extra:
        raise ValueError(
            f"{source}: contains {len(extra)} tensors that do not belong to the model described by its "
            f"arguments, such as {extra[0]}"
        )
    return found


def export_tensors(model: ModelConfig, rows: int) -> list[Named]:
    """Returns a model's tensors under the names that Megatron-LM loads: one tensor for all layers, norms as in TE."""
    return [Named(name, shape, *next(_their_names(name))) for name, shape in model_tensors(model, rows)]


def model_tensors(model: ModelConfig, rows: int) -> Iterator[tuple[str, Shape]]:
    """Yields name and unsharded shape of every tensor of a model."""
    hidden = model.hidden_size
    yield "embedding.word_embeddings.weight", (rows, hidden)
    if model.position_embedding_type == "learned_absolute":
        yield "embedding.position_embeddings.weight", (model.resolved_max_position_embeddings, hidden)
    for layer in range(model.num_layers):
        for name, shape in _layer_tensors(model):
            yield f"{_LAYERS}{layer}.{name}", shape
    yield from _norm("decoder.final_layernorm", model, hidden)
    if model.untie_embeddings_and_output_weights:
        yield "output_layer.weight", (rows, hidden)


def _layer_tensors(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, ffn, head = model.hidden_size, model.resolved_ffn_hidden_size, model.resolved_kv_channels
    queries = model.num_attention_heads * head
    qkv = queries + 2 * model.resolved_num_query_groups * head
    yield from _norm("input_layernorm", model, hidden)
    yield from _linear("self_attention.linear_qkv", qkv, hidden, model.has_qkv_bias)
    if model.qk_layernorm:
        yield from _norm("self_attention.q_layernorm", model, head)
        yield from _norm("self_attention.k_layernorm", model, head)
    yield from _linear("self_attention.linear_proj", hidden, queries, model.has_attention_output_bias)
    yield from _norm("pre_mlp_layernorm", model, hidden)
    yield from _linear("mlp.linear_fc1", 2 * ffn if model.swiglu else ffn, hidden, model.has_mlp_bias)
    yield from _linear("mlp.linear_fc2", hidden, ffn, model.has_mlp_bias)


def _norm(name: str, model: ModelConfig, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if model.normalization == "LayerNorm":
        yield f"{name}.bias", (width,)


def _linear(name: str, outputs: int, inputs: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if has_bias:
        yield f"{name}.bias", (outputs,)


def _their_names(name: str) -> Iterator[tuple[str, int | None]]:
    """Yields the names that a tensor may have in Megatron-LM, with the index of its layer in a tensor of all layers."""
    if not name.startswith(_LAYERS):
        yield name, None
        return
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    suffixes = [rest]
    for ours, theirs in _NORMS.items():
        if rest.startswith(ours):
            suffixes = [theirs + rest.removeprefix(ours), rest]
    for suffix in suffixes:
        yield _LAYERS + suffix, int(number)
    for suffix in suffixes:
        yield f"{_LAYERS}{number}.{suffix}", None


def _is_no_model_tensor(name: str) -> bool:
    return name.startswith(("optimizer.", "chained_", "rng_state", "rerun_state")) or "_extra_state" in name
