"""Chooses the parallel layout for inference if the user has not given it."""

import itertools
from collections.abc import Sequence

from megatron_ext.config.cross_checks import validate
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.training.interface.family_interface import Family


def choose_layout(
    model: ModelConfig,
    families: Sequence[Family],
    world_size: int,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
) -> ParallelConfig:
    """Returns the layout that shards the model over the largest possible number of processes.

    If several layouts use equally many processes, the one with the largest tensor-parallel size is returned. The
    remaining processes hold copies of the model (data parallelism).

    Args:
        model: configuration of the base model.
        families: model families that the model is built with; each may reject a layout.
        world_size: number of processes.
        tensor: tensor-parallel size given by the user, or None; if given, the pipeline-parallel size defaults to 1.
        pipeline: pipeline-parallel size given by the user, or None.

    Raises:
        ValueError: the given sizes do not fit the model or the number of processes.
    """
    if tensor is not None:
        asked = _layout(tensor, pipeline or 1)
        check_layout(model, families, asked, world_size)
        return asked
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    stages = divisors if pipeline is None else [pipeline]
    sizes = sorted(itertools.product(divisors, stages), key=lambda pair: (pair[0] * pair[1], pair[0]))
    layouts = [_layout(*pair) for pair in reversed(sizes)]
    for layout in layouts:
        try:
            check_layout(model, families, layout, world_size)
        except ValueError as error:
            refused = error
        else:
            return layout
    raise refused  # the smallest layout fits any number of processes, so a size that the user gave must be wrong


def check_layout(
    model: ModelConfig, families: Sequence[Family], layout: ParallelConfig, world_size: int
) -> None:
    """Raises `ValueError` if the base model or one of the model families does not support the layout."""
    validate(model, layout, world_size=world_size)
    for family in families:
        family.check(model, layout)


def describe_layout(layout: ParallelConfig, world_size: int) -> str:
    """Returns a one-line description of a parallel layout, for the log."""
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return (
        f"{world_size} processes: tensor parallel {tensor}, pipeline parallel {pipeline}, "
        f"{layout.data_parallel_size(world_size)} "
        f"cop{'ies' if layout.data_parallel_size(world_size) > 1 else 'y'} of "
        "the model"
    )


def _layout(tensor: int, pipeline: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
