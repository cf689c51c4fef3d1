"""Trains variants of a model in several parallel layouts, and compares each run with a run in a single process.

All runs with the same number of processes share one group of processes, which starts when the first of these runs is
needed. Runs in a single process use the caller's process.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.platform.process_groups import world_size
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import (
    CONSTANT,
    CONTEXT_LAYOUTS,
    LAYOUTS,
    TINY,
    WORLD_SIZES,
    TrainingTrace,
    assemble,
    train_and_keep,
    with_full_recompute,
)
from megatron_ext.training.interface.family_interface import Family

RECOMPUTED, MLP_RECOMPUTED = " recomputed", " MLP recomputed"
"""Suffixes of a layout's name, for runs that recompute whole layers or only attention and MLP in the backward pass."""

OVERLAPPED = "DP2 overlapped distributed optimizer"
OVERLAPPED_PIPELINE = "DP2xPP2 interleaved, overlapped distributed optimizer"
OVERLAPPED_CONTEXT = "DP2xCP2 overlapped distributed optimizer"
OVERLAPPED_STAGES = "PP2 interleaved, overlapped"
_OVERLAP = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
UNEVEN = "PP2 uneven"
UNEVEN_STAGES = replace(LAYOUTS["PP2"], decoder_first_pipeline_num_layers=1)
_MORE_LAYOUTS = {
    **CONTEXT_LAYOUTS,
    UNEVEN: (UNEVEN_STAGES, 2),
    OVERLAPPED: (_OVERLAP, 2),
    OVERLAPPED_CONTEXT: (replace(_OVERLAP, context_parallel_size=2), 4),
    # With DP2 each rank has two micro-batches for two stages, so the same two ranks exchange two kinds of messages at
    # the same time.
    OVERLAPPED_PIPELINE: (
        replace(_OVERLAP, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
        4,
    ),
    OVERLAPPED_STAGES: (replace(LAYOUTS["PP2 interleaved"], overlap_p2p_communication=True), 2),
}

SavedTensors = set[tuple[str, tuple[int, ...]]]
"""Key and global shape of every tensor that one rank saves as its owner; other ranks may hold copies of the tensor."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model and its training settings. It is pickled for other processes, so its functions must be module-level."""

    make_families: Callable[[], list[Family]] = list
    model: ModelConfig = TINY
    steps: int = 2
    precision: Precision = "fp32"
    micro_batch_size: int | None = None
    """Sequences in a micro-batch; a global batch has four. None means 2, with which a step takes half the time.

    None means 1 in bf16 and fp16, where the size of the micro-batches affects rounding. It also means 1 if a rank
    would otherwise have too few micro-batches for its pipeline or for overlapped communication.
    """

    settings: OptimizerSettings = CONSTANT
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """Values that replace fields of `ParallelConfig` in every layout."""

    examine: Callable[[list[GPTModel]], Any] | None = None
    """Function to call on the untrained model, or None; its results in all layouts are compared, too. The function
    must not change the model.
    """


@dataclass
class Run:
    """Result of training one variant in one layout, on one rank."""

    trace: TrainingTrace
    saved: SavedTensors
    """The tensors that this rank saves."""

    examined: Any = None
    """Result of the variant's `examine`."""


class LayoutRuns:
    """Runs of all variants of one model family, each trained when its result is first needed.

    Args:
        variants: variants by name.
        layouts: names of the layouts in which all variants train, in addition to the single process.
        some: further layouts, in which only some variants train: maps a layout's name to the names of these variants.
    """

    def __init__(
        self,
        variants: Mapping[str, Variant],
        layouts: Iterable[str],
        some: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.variants = variants
        self.layouts = {layout: list(variants) for layout in ("TP1", *layouts)} | dict(some or {})
        self._found: dict[int, list[dict[str, dict[str, Run]]]] = {}

    def cases(self) -> list[tuple[str, str]]:
        """Returns (layout, variant) for every run except those in a single process."""
        return [(layout, name) for layout, names in self.layouts.items() if layout != "TP1" for name in names]

    def at(self, layout: str, variant: str) -> list[Run]:
        """Returns the results of a variant in a layout on all ranks; trains it first if needed."""
        size = _world_size(layout)
        if size not in self._found:
            runs = {
                name: {variant: self.variants[variant] for variant in variants}
                for name, variants in self.layouts.items()
                if _world_size(name) == size
            }
            several = size > 1
            self._found[size] = (
                run_distributed(_train_all, size, runs) if several else [run_single(_train_all, runs)]
            )
        return [of_rank[layout][variant] for of_rank in self._found[size]]

    def single(self, variant: str) -> Run:
        """Returns the result of a variant in a single process."""
        return self.at("TP1", variant)[0]


def _base(layout: str) -> str:
    return layout.removesuffix(MLP_RECOMPUTED).removesuffix(RECOMPUTED)


def _world_size(layout: str) -> int:
    name = _base(layout)
    return _MORE_LAYOUTS[name][1] if name in _MORE_LAYOUTS else WORLD_SIZES[name]


def _parallel(layout: str) -> ParallelConfig:
    name = _base(layout)
    parallel = _MORE_LAYOUTS[name][0] if name in _MORE_LAYOUTS else LAYOUTS[name]
    if layout.endswith(MLP_RECOMPUTED):
        return replace(parallel, recompute_granularity="selective", recompute_modules=("core_attn", "mlp"))
    return with_full_recompute(parallel) if layout.endswith(RECOMPUTED) else parallel


def _train_all(runs: dict[str, dict[str, Variant]]) -> dict[str, dict[str, Run]]:
    return {
        layout: {name: train_variant(variant, _parallel(layout)) for name, variant in variants.items()}
        for layout, variants in runs.items()
    }


def train_variant(variant: Variant, parallel: ParallelConfig) -> Run:
    """Trains a variant in a parallel layout; call it in every process of the layout."""
    parallel = replace(parallel, **variant.parallel)
    trace, chunks, examined = train_and_keep(
        parallel,
        variant.steps,
        variant.make_families,
        variant.model,
        variant.precision,
        variant.settings,
        variant.micro_batch_size or _micro_batch_size(variant, parallel),
        variant.examine,
    )
    return Run(trace, saved_tensors(chunks), examined)


def _micro_batch_size(variant: Variant, parallel: ParallelConfig) -> int:
    copies = parallel.data_parallel_size(world_size())
    is_interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
    needs_several = parallel.pipeline_model_parallel_size > 1 or parallel.overlap_grad_reduce
    by_one = variant.precision != "fp32" or is_interleaved or (needs_several and copies > 1)
    return 1 if by_one else 2


def saved_tensors(chunks: list[GPTModel]) -> SavedTensors:
    """Returns the key and global shape of every tensor that this rank saves as its owner."""
    found = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            shards = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            found += [
                (shard.key, shard.global_shape, shard.global_offset)
                for shard in shards
                if isinstance(shard, ShardedTensor) and not any(shard.replica_id)
            ]
    assert len(set(found)) == len(found), "a tensor has two owners"
    return {(key, shape) for key, shape, _ in found}


def assert_same_run(
    found: list[Run],
    expected: Run,
    *,
    losses: float = 1e-5,
    norms: float = 1e-4,
    gradients: float = 1e-5,
    statistics: float = 1e-3,
) -> None:
    """Asserts that the results of all ranks equal the result in a single process, within tolerances.

    Args:
        found: results, ordered by rank.
        expected: result in a single process; may have more steps.
        losses: relative tolerance for losses; for the first step a tenth of it, but at least 1e-6.
        norms: relative tolerance for gradient norms.
        gradients: tolerance for every parameter's gradient in the first step, relative to the gradient's norm.
        statistics: relative tolerance for the statistics of the model family.
    """
    wanted = expected.trace
    for run in found:
        trace, steps = run.trace, len(run.trace.losses)
        assert trace.losses[0] == pytest.approx(wanted.losses[0], rel=max(losses / 10, 1e-6), nan_ok=True)
        assert trace.losses == pytest.approx(wanted.losses[:steps], rel=losses, nan_ok=True)
        assert trace.grad_norms == pytest.approx(wanted.grad_norms[:steps], rel=norms)
        for ours, theirs in zip(trace.layer_losses, wanted.layer_losses, strict=False):
            assert ours == pytest.approx(theirs, rel=2 * losses, abs=1e-9)
        assert trace.statistics == pytest.approx(wanted.statistics, rel=statistics, abs=1e-6, nan_ok=True)
        assert run.examined == expected.examined
    if found[
        0
    ].trace.first_gradients:  # the list is empty with the distributed optimizer, which shards gradients
        assert_same_gradients([run.trace for run in found], wanted, gradients)
    assert set().union(*(run.saved for run in found)) == expected.saved


def assert_same_gradients(found: list[TrainingTrace], expected: TrainingTrace, tolerance: float) -> None:
    """Asserts that every parameter's gradient in the first step, joined from all ranks' shards, is as expected."""
    gradients, wanted = assemble(found), assemble([expected])
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        difference = torch.linalg.norm(gradients[key] - gradient)
        assert difference <= tolerance * torch.linalg.norm(gradient) + 1e-12, key
