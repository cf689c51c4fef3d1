"""Estimates a run's memory before anything is built, and refuses a run that cannot fit.

A dry run prints the same estimate. The check ignores temporary tensors and leaves a margin for the estimate's error,
so a run that passes the check may still run out of memory.
"""

import os

from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.costs.activation_memory import ParallelLayout
from megatron_ext.models.costs.memory_estimate import StageMemory, estimate_memory
from megatron_ext.platform.device_memory import device_memory
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.logging.family_costs import BASE, RunCost, run_cost
from megatron_ext.training.logging.progress_line import binary_size

_CERTAIN = 0.95
"""Fraction of the estimate that a run certainly needs; in the tests, estimate and rehearsal differ by at most 5 %."""


def plan_memory(
    config: RunConfig, tokenizer: Tokenizer, families: list[Family], copies: int
) -> tuple[ParallelLayout, RunCost, list[StageMemory]]:
    """Returns a run's parallel layout, the cost of its last step, and the memory per rank of every pipeline stage.

    Args:
        config: the run's configuration, resolved.
        tokenizer: the tokenizer, from which the vocabulary size is taken.
        families: the run's model families, whose parameters and FLOPs are included.
        copies: number of model copies, which is the data-parallel size.
    """
    model, parallel, training = config.model, config.parallel, config.training
    batch = training.resolved_global_batch_size(copies)
    tensor, last_step = parallel.tensor_model_parallel_size, training.resolved_train_iters(batch)
    cost = run_cost(model, tokenizer.vocab_size, tensor, families, last_step)
    layout = ParallelLayout(
        model=model,
        parallel=parallel,
        vocab_size=tokenizer.vocab_size,
        micro_batch_size=training.micro_batch_size,
        num_microbatches=batch // (training.micro_batch_size * copies),
        data_parallel_size=copies,
        precision=training.precision,
        work=cost.work,
    )
    of_families = [part for name, part in cost.parts.items() if name != BASE]
    stages = estimate_memory(
        layout,
        sum(part.parameters for part in of_families),
        sum(part.trained_parameters - part.trained_apart for part in of_families),
        [added for family in families if (added := family.activations(layout, last_step)) is not None],
    )
    return layout, cost, stages


def check_memory(config: RunConfig, tokenizer: Tokenizer, families: list[Family], copies: int) -> None:
    """Checks that this machine has enough memory for the estimated needs of its ranks; arguments as for `plan_memory`.

    Raises:
        ValueError: the estimate exceeds the memory.
    """
    layout, cost, stages = plan_memory(config, tokenizer, families, copies)
    limit, is_shared = device_memory()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if is_shared else 1
    # The stages that run on this machine are unknown here. For shared memory, assume the mean over all stages; for
    # one device per rank, assume the smallest stage. Then a run that fits is never refused.
    counted = stages if is_shared else [min(stages, key=lambda stage: stage.kept_bytes)]
    share = _CERTAIN * ranks / len(counted)
    needed = share * sum(stage.kept_bytes for stage in counted)
    held = share * sum(stage.activation_bytes for stage in counted)
    copied = (
        ranks / copies * _saved_bytes(config, stages) if is_shared and config.checkpoint.async_save else 0.0
    )
    if needed + copied <= limit:
        return
    if needed <= limit:
        raise ValueError(
            f"--async-save: a step and the copy of the saved tensors need about {binary_size(needed + copied)} "
            f"({binary_size(copied)} of this for the copy), but this machine has only "
            f"{binary_size(limit)}; omit the flag"
        )
    model = layout.model
    if held > needed / 2:
        flags = f"--seq-length {model.seq_length}, --micro-batch-size {layout.micro_batch_size}"
    else:
        flags = f"--num-layers {model.num_layers}, --hidden-size {model.hidden_size}"
        for family in families:
            if family.name in cost.parts and cost.parts[family.name].parameters > cost.parts[BASE].parameters:
                flags = family.size_flags() or flags
    raise ValueError(
        f"{flags}: a step needs about {binary_size(needed)} on {ranks} process{'es' if ranks > 1 else ''} "
        f"({binary_size(held)} of this for activations), but "
        f"{'this machine' if is_shared else 'the device'} has only {binary_size(limit)}; reduce these sizes "
        "(--dry-run lists the memory by kind)"
    )


def _saved_bytes(config: RunConfig, stages: list[StageMemory]) -> float:
    """Returns the size of a rank's parameters and optimizer state; the mean over the pipeline stages."""
    optimizer = 0.0 if config.checkpoint.no_save_optim else 1.0
    return sum(stage.parameter_bytes + optimizer * stage.optimizer_bytes for stage in stages) / len(stages)
