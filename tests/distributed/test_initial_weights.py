"""A run's initial weights do not depend on how it is divided."""

from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model, padded_vocab_size
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.models.model_extension import Extension
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_extension import PerLayerExtension
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES

UNTIED = replace(TINY, untie_embeddings_and_output_weights=True, position_embedding_type="learned_absolute")
Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


@pytest.mark.parametrize("layout", ["TP2", "PP2", "PP2 interleaved", "TP2xPP2", "TP2+SP"])
def test_every_shard_is_a_slice_of_the_single_process_weight(layout: str) -> None:
    whole = {name: values for name, _, _, values in run_single(_weights, LAYOUTS["TP1"])}
    ranks = run_distributed(_weights, WORLD_SIZES[layout], LAYOUTS[layout])
    covered = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in whole.items()}
    for name, shape, offset, values in (shard for rank in ranks for shard in rank):
        place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        assert shape == whole[name].shape, name
        assert torch.equal(values, whole[name][place]), name
        covered[name][place] = True
    assert all(bool(mask.all()) for mask in covered.values())


def _weights(parallel: ParallelConfig) -> list[Shard]:
    initialize(parallel, seed=1)
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=8,
        per_layer_vocab_size=40,
        per_layer_combination_method="concat",
    )
    extensions = [PerLayerExtension(settings, rows=40)]
    chunks = build_model(UNTIED, parallel, vocab_size=VOCAB_SIZE, seed=5, extensions=list(extensions))
    found: dict[tuple[str, tuple[int, ...]], Shard] = {}
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            if isinstance(value, ShardedTensorFactory):
                built = value.build()
                pieces = list(built.values()) if isinstance(built, dict) else list(built)
            else:
                pieces = [value] if isinstance(value, ShardedTensor) else []
            for piece in pieces:
                values = piece.data.detach().clone()
                found[piece.key, piece.global_offset] = (
                    piece.key,
                    piece.global_shape,
                    piece.global_offset,
                    values,
                )
    return _joined(list(found.values())) if parallel == LAYOUTS["TP1"] else list(found.values())


def _joined(shards: list[Shard]) -> list[Shard]:
    """The single process's weights whole: a gated projection comes in two pieces."""
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, values in shards:
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return [(name, tuple(v.shape), (0,) * v.dim(), v) for name, v in whole.items()]


class HidingModule(torch.nn.Module):
    """A slot module that holds a split weight and has no sharded state dict of its own."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(
            config.hidden_size, 8, config=config, init_method=config.init_method, bias=False
        )


class HidingExtension(Extension):
    """Puts a `HidingModule` into every layer."""

    name = "hiding"

    def slots(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        return {"after_mlp": ModuleSpec(module=HidingModule)}


def test_split_weight_that_is_saved_as_if_whole_is_refused() -> None:
    run_single(_build_hiding, LAYOUTS["TP1"])
    with pytest.raises(RuntimeError, match="is split over tensor-parallel ranks, but"):
        run_distributed(_build_hiding, 2, LAYOUTS["TP2"])


def _build_hiding(parallel: ParallelConfig) -> None:
    initialize(parallel, seed=1)
    build_model(TINY, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[HidingExtension()])


def test_layers_differ_and_seeds_differ_and_projections_are_scaled_by_depth() -> None:
    weights, others = run_single(_named_weights)
    first, second = (weights[f"decoder.layers.{n}.self_attention.linear_qkv.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, others["decoder.layers.0.self_attention.linear_qkv.weight"])
    for name, values in weights.items():
        if "norm" in name:
            assert torch.equal(values, torch.ones_like(values)), name
        else:
            scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = WIDE.init_method_std / ((2 * WIDE.num_layers) ** 0.5 if scaled else 1.0)
            assert float(values.std()) == pytest.approx(expected, rel=0.05), name
            assert abs(float(values.mean())) < 0.05 * expected, name


WIDE = ModelConfig(
    num_layers=2, hidden_size=128, num_attention_heads=4, seq_length=8, swiglu=True, disable_bias_linear=True
)


def _named_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    initialize(ParallelConfig(), seed=1)
    models = [build_model(WIDE, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=seed)[0] for seed in (1, 2)]
    first, second = ({name: p.detach() for name, p in model.named_parameters()} for model in models)
    return first, second


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tensor_parallel", "rows"),
    [
        (96, 128, 1, 128),
        (96, 128, 2, 128),
        (128, 128, 2, 128),
        (129, 128, 4, 256),
        (50257, 128, 8, 50304),
        (10, 1, 4, 12),
        (100, 3, 2, 102),
        (1, 128, 1, 128),
    ],
)
def test_padded_vocabulary_is_the_next_multiple_that_the_ranks_divide(
    vocab_size: int, multiple: int, tensor_parallel: int, rows: int
) -> None:
    model = replace(TINY, make_vocab_size_divisible_by=multiple)
    assert padded_vocab_size(vocab_size, model, tensor_parallel) == rows
    assert rows % multiple == 0 and rows % tensor_parallel == 0


def test_padded_vocabulary_does_not_change_with_a_layout_that_divides_the_multiple() -> None:
    assert len({padded_vocab_size(50257, TINY, ranks) for ranks in (1, 2, 4, 8, 16)}) == 1
