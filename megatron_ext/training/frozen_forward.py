"""Runs additional forward passes through a frozen part of the model; their results may be cached.

There are two uses: NPT's teacher (the base model, whose hidden states are used to train NPT's layers) and, in
progressive growth, the trunk (the layers below the trained stack). Each has a cache of its own. The teacher's results
depend on tokens and positions only; the trunk's results also depend on its weights and on all other inputs.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.data.datasets.sample_ids import Id, digest
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.output_with_bias import output_with_bias
from megatron_ext.training.engine.microbatches import run_directly, run_forward
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import NoLoss


class FrozenForward:
    """Base class for the teacher's and the trunk's caches: makes all ranks agree on hits, counts hits and misses."""

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self.was_skipped = False
        """Whether the last lookup found cached values for all micro-batches, so that the pass was not run."""

    def agree(self, found: list[bool], device: torch.device) -> list[bool]:
        """Returns, for each micro-batch, whether all ranks of a model copy have cached its values; collective.

        Args:
            found: for each micro-batch, whether this rank has cached its values.
            device: device of the tensor that the ranks exchange.
        """
        agreed = torch.tensor(found, dtype=torch.int32, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
        # megatron-core's model-parallel group does not include the context-parallel ranks.
        if parallel_state.get_context_parallel_world_size() > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=parallel_state.get_context_parallel_group())
        hits: list[bool] = agreed.bool().tolist()
        self.hits += sum(hits)
        self.misses += len(hits) - sum(hits)
        self.was_skipped = all(hits)
        return hits


def ids_of_parts(ids: list[Id], device: torch.device) -> list[Id]:
    """Returns one id per sequence that identifies the results for this rank's part of the sequence. Collective.

    Under context parallelism, a rank's results also depend on the other ranks' parts of a sequence. Each returned id
    is therefore a digest of the ids of all parts and of this rank's index. Without context parallelism, the result is
    `ids`.

    Args:
        ids: one id per sequence that identifies the inputs of this rank's part.
        device: device of the tensor that the ranks exchange.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1 or not ids:
        return ids
    own = torch.tensor([list(each) for each in ids], dtype=torch.uint8, device=device)
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    place = group.rank().to_bytes(8, "little")
    return [digest([place, of_sequence.tobytes()]) for of_sequence in torch.stack(parts, 1).cpu().numpy()]


@torch.no_grad()
def run_frozen(
    chunks: list[GPTModel],
    families: list[Family],
    batches: list[Batch],
    watched: Mapping[str, torch.nn.Module],
    output: NoLoss,
    watched_outputs: Mapping[str, torch.nn.Module] = MappingProxyType({}),
) -> list[dict[str, torch.Tensor]]:
    """Runs the forward pass on micro-batches, without gradients and without dropout.

    Args:
        chunks: this rank's model chunks, unwrapped.
        families: all model families of the run.
        batches: micro-batches from `Family.prepare_batches`; the pipeline schedule must accept their number.
        watched: the modules whose inputs are recorded, by name: layers or norms of this rank.
        output: called with the output layer's input, on the last stage.
        watched_outputs: the modules whose outputs are recorded, by name: attentions or MLPs of this rank, which return
            output and bias.

    Returns:
        For each micro-batch, the recorded tensors by name, [s, b, h] ([s/t, b, h] under sequence parallel).
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*watched, *watched_outputs)}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, kept=found[name]: kept.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for name, module in watched.items()
    ]
    hooks += [
        module.register_forward_hook(
            lambda _, args, returned, kept=found[name]: kept.append(output_with_bias(returned))
        )
        for name, module in watched_outputs.items()
    ]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            run_forward(chunks, families, batches, output)
        else:
            # Do not use the schedule, because this pass may run while the schedule fetches its next batch.
            for batch in batches:
                output(chunks[0], batch, run_directly(chunks[0], families, batch))
    finally:
        for hook in hooks:
            hook.remove()
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
    return [{name: values[place] for name, values in found.items()} for place in range(len(batches))]
