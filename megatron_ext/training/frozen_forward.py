"""A pass through a frozen part of the model, beside the training step, whose values a cache may keep.

NPT's teacher and the trunk under a progressive stack are such passes. What is kept, and by which key, is theirs:
the teacher's values depend on tokens and positions, the trunk's on its weights and on all inputs too.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.training.engine.microbatches import run_directly, run_microbatches
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import NoLoss


class FrozenForward:
    """Counts the micro-batches whose values were found in a cache."""

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self.was_skipped = False
        """The last look-up found everything, and the pass was not run."""

    def agree(self, found: list[bool], device: torch.device) -> list[bool]:
        """Takes which micro-batches this rank has found, and returns which every rank of its model copy has found."""
        agreed = torch.tensor(found, dtype=torch.int32, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
        hits: list[bool] = agreed.bool().tolist()
        self.hits += sum(hits)
        self.misses += len(hits) - sum(hits)
        self.was_skipped = all(hits)
        return hits


@torch.no_grad()
def run_frozen(
    chunks: list[GPTModel],
    families: list[Family],
    batches: list[Batch],
    watched: Mapping[str, torch.nn.Module],
    output: NoLoss,
) -> list[dict[str, torch.Tensor]]:
    """Runs micro-batches forward, without gradients and dropout, and returns the inputs of some modules, by name.

    Without pipeline parallelism the schedule is not used: it may be under way.

    Args:
        chunks: this rank's model chunks, unwrapped.
        families: all families of the run.
        batches: micro-batches on the device; with a pipeline as many as its schedule can take.
        watched: modules of this rank, layers or their norms.
        output: gets what the output layer would read, on the last stage.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in watched}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, kept=found[name]: kept.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for name, module in watched.items()
    ]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            run_microbatches(chunks, families, batches, output, forward_only=True)
        else:
            for batch in batches:
                output(chunks[0], batch, run_directly(chunks[0], families, batch))
    finally:
        for hook in hooks:
            hook.remove()
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
    return [{name: values[place] for name, values in found.items()} for place in range(len(batches))]
