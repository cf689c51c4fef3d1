"""How a model is cut for inference where the user does not say: over as many processes as fit, tensor ranks first."""

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
    """The layout that spreads the model over most processes; between equal ones that of more tensor ranks.

    What is left of the processes holds copies of the model (data parallel).

    Args:
        model: the base model.
        families: the model's.
        world_size: number of processes.
        tensor: the user's tensor-parallel size; the pipeline's is then 1 unless it is given too.
        pipeline: the user's pipeline-parallel size.

    Raises:
        ValueError: the sizes given do not fit the model or the processes.
    """
    if tensor is not None:
        asked = _layout(tensor, pipeline or 1)
        check_layout(model, families, asked, world_size)
        return asked
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    stages = divisors if pipeline is None else [pipeline]
    sizes = sorted(itertools.product(divisors, stages), key=lambda cut: (cut[0] * cut[1], cut[0]))
    layouts = [_layout(*cut) for cut in reversed(sizes)]
    for layout in layouts:
        try:
            check_layout(model, families, layout, world_size)
        except ValueError as error:
            refused = error
        else:
            return layout
    raise refused  # of one tensor rank: what the user gave does not fit


def check_layout(
    model: ModelConfig, families: Sequence[Family], layout: ParallelConfig, world_size: int
) -> None:
    """Raises `ValueError` where a model with its families cannot be cut so."""
    validate(model, layout, world_size=world_size)
    for family in families:
        family.check(model, layout)


def describe_layout(layout: ParallelConfig, world_size: int) -> str:
    """The layout in words, for a line of its own."""
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return (
        f"{world_size} processes: --tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}, "
        f"{layout.data_parallel_size(world_size)} cop{'ies' if layout.data_parallel_size(world_size) > 1 else 'y'} of "
        "the model"
    )


def _layout(tensor: int, pipeline: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
