"""Counts parameters and FLOPs of a run's base model and families, and what a step trains of them.

`--dry-run` shows them. MFU uses them after every step, since one step may train other parts than the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.costs.model_cost import ModelCost, model_cost
from megatron_ext.models.costs.step_work import StepWork, merged_work
from megatron_ext.training.interface.family_interface import Family

BASE = "base"
"""Name of the base model in `RunCost.parts`."""


@dataclass(frozen=True)
class RunCost:
    """Costs of the parts of a run's model, and what a step does."""

    parts: dict[str, ModelCost]
    """Cost of `base`, then of each family by name."""

    work: StepWork | None
    """What a step does with the base model; None if everything trains."""


def run_cost(
    model: ModelConfig, vocab_size: int, tensor_parallel_size: int, families: Sequence[Family], iteration: int
) -> RunCost:
    """Returns the costs of a step.

    Args:
        model: the base model.
        vocab_size: the tokenizer's, before padding.
        tensor_parallel_size: the padding depends on it.
        families: of the run.
        iteration: the step, from 1; see `Family.step_work`.
    """
    works = {family.name: family.step_work(model, iteration) for family in families}
    work = merged_work([of_family for of_family in works.values() if of_family is not None])
    parts = {BASE: model_cost(model, vocab_size, tensor_parallel_size, work)}
    for family in families:
        cost, own = family.cost(model), works[family.name]
        if cost is not None and own is not None:
            cost = replace(cost, trained=own.trained_parameters, training_flops=own.flops_per_token)
        if cost is not None:
            parts[family.name] = cost
    return RunCost(parts, work)
