"""Computes the parameters and FLOPs of a run's base model and model families in a given step, for MFU and `--dry-run`.

Different steps may train different parts of the model, so the costs depend on the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.costs.model_cost import ModelCost, model_cost
from megatron_ext.models.costs.step_work import StepWork, merged_work
from megatron_ext.training.interface.family_interface import Family

BASE = "base"
"""Key of the base model in `RunCost.parts`."""


@dataclass(frozen=True)
class RunCost:
    """The cost of one step."""

    parts: dict[str, ModelCost]
    """Cost of the base model under `base`, then of each model family under its name."""

    work: StepWork | None
    """The parts of the base model that the step runs and trains; None if everything trains."""


def run_cost(
    model: ModelConfig, vocab_size: int, tensor_parallel_size: int, families: Sequence[Family], iteration: int
) -> RunCost:
    """Returns the cost of a step.

    Args:
        model: configuration of the base model.
        vocab_size: the tokenizer's vocabulary size, before padding.
        tensor_parallel_size: determines the padding of the vocabulary.
        families: the model families of the run.
        iteration: number of the step, from 1.
    """
    # Ignore a frozen family's `step_work`, which describes a step that trains the family.
    works = {
        family.name: None if family.is_frozen else family.step_work(model, iteration) for family in families
    }
    work = merged_work([of_family for of_family in works.values() if of_family is not None])
    parts = {BASE: model_cost(model, vocab_size, tensor_parallel_size, work)}
    for family in families:
        cost, own = family.cost(model), works[family.name]
        if cost is not None and family.is_frozen:
            # A frozen family costs the forward pass and the gradients of inputs.
            cost = replace(cost, trained=0, training_flops=2 * cost.forward_flops_per_token)
        if cost is not None and own is not None:
            cost = replace(cost, trained=own.trained_parameters, training_flops=own.flops_per_token)
        if cost is not None:
            parts[family.name] = cost
    return RunCost(parts, work)
