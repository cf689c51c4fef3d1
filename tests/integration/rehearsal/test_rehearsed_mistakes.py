"""Mistakes that a run on the CPU does not show, and that a rehearsal finds; each is made in the rehearsal's process."""

from typing import Any

import pytest

from megatron_ext.testing.rehearsing.rehearsals import Rehearsed, rehearse
from tests.integration.rehearsal.rehearsal_flags import CP, PLAIN, PP, SHARDED, SP, TP, needs_device

pytestmark = needs_device

FLAGS = ("--bf16 " + PLAIN + TP + PP + SP + SHARDED).split()


def rehearsed_with(mistake: Any, rank: int = 7) -> Rehearsed:
    return rehearse("pretrain_gpt_per_layer.py", *FLAGS, processes=8, rank=rank, before=mistake)


def mask_on_the_cpu() -> None:
    from megatron_ext.training.interface.output_losses import OutputLoss

    loss: Any = OutputLoss
    loss.of_tokens = lambda self, model, batch, output: {"lm loss": (output, batch["loss_mask"].cpu())}


def cpu_tensor_in_a_collective() -> None:
    import torch

    from megatron_ext.training import stop_signals

    watcher: Any = stop_signals.SignalWatcher
    correct = watcher.shared

    def shared(self: Any, *, time_is_left: bool) -> Any:
        module: Any = stop_signals
        module.dist.all_reduce(torch.zeros(2))
        return correct(self, time_is_left=time_is_left)

    watcher.shared = shared


def gradients_not_reduced() -> None:
    from megatron.core.distributed import DistributedDataParallel

    wrapper: Any = DistributedDataParallel
    wrapper.start_grad_sync = wrapper.finish_grad_sync = lambda self, *_, **__: None


def keys_not_gathered() -> None:
    from megatron_ext.models.ops import attention

    module: Any = attention
    module.gather_sequence = lambda part, group: part


def strides_of_a_transposed_batch_of_one() -> None:
    from megatron_ext.models.ops import attention

    module: Any = attention
    module.plain_strides = lambda tensor: tensor


def wait_in_every_layer() -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    layer: Any = TransformerLayer
    correct = layer.forward

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        assert float(hidden_states.sum()) == float(hidden_states.sum())
        return correct(self, hidden_states, *args, **kwargs)

    layer.forward = forward


def batches_not_pinned() -> None:
    from megatron_ext.training.engine import microbatches

    module: Any = microbatches
    module._moved = lambda value, device: value.to(device, non_blocking=True)


def groups_split_from_the_default_group() -> None:
    from megatron_ext.platform import process_groups

    module: Any = process_groups
    module._split_no_groups = lambda: None


def test_gloo_groups_beside_groups_that_nccl_splits_are_an_error() -> None:
    flags = (*FLAGS, "--distributed-backend", "nccl")
    correct, split = (
        rehearse("pretrain_gpt_per_layer.py", *flags, processes=8, before=mistake)
        for mistake in (None, groups_split_from_the_default_group)
    )
    assert correct.error is None
    assert split.error is not None
    assert "new_group: would hang, because the default group was initialized with device_id" in split.error


def test_a_copy_from_memory_that_is_not_pinned_is_a_wait() -> None:
    (copies,) = (n for place, n in rehearsed_with(batches_not_pinned).waits().items() if "copy" in place)
    micro_batches, fields = 2, 5
    assert copies == micro_batches * fields


def test_a_mask_on_the_cpu_is_an_error() -> None:
    error = rehearsed_with(mask_on_the_cpu).error
    assert error is not None
    assert "cpu" in error
    assert "cuda:0" in error


def test_a_cpu_tensor_in_a_collective_is_named_with_its_place() -> None:
    rehearsed = rehearsed_with(cpu_tensor_in_a_collective)
    assert rehearsed.error is None
    (note,) = (note for note in rehearsed.notes if "step" in note)
    assert "all-reduce of a CPU tensor over all" in note
    assert "training/loop.py" in note


def test_gradients_that_no_step_reduces_are_named() -> None:
    rehearsed = rehearsed_with(gradients_not_reduced)
    assert rehearsed.error is None
    assert rehearsed.notes == ["no step reduces gradients over DP (size 2)"]


def test_keys_that_no_step_gathers_are_named() -> None:
    flags = f"--bf16 {PLAIN} {CP}".split()
    rehearsed = rehearse("pretrain_gpt_per_layer.py", *flags, processes=8, before=keys_not_gathered)
    assert rehearsed.error is None
    assert rehearsed.notes == ["no step sends keys and values over CP (size 2)"]


def test_a_product_that_is_computed_row_by_row_is_named() -> None:
    flags = f"--mode lm --npt-layers upper_half {PLAIN} --num-query-groups 8".split()
    slow, correct = (
        rehearse("pretrain_npt.py", *flags, processes=1, before=mistake)
        for mistake in (strides_of_a_transposed_batch_of_one, None)
    )
    assert correct.notes == []
    assert any("computed row by row" in note and "in step 2" in note for note in slow.notes)


def test_a_wait_in_the_layers_is_counted_for_each_micro_batch_and_layer() -> None:
    rehearsed, correct = rehearsed_with(wait_in_every_layer), rehearsed_with(None)
    more = sum(rehearsed.waits().values()) - sum(correct.waits().values())
    micro_batches, layers = 2, 2
    assert more == 2 * micro_batches * layers
    assert not any("transformer_layer" in place for place in correct.waits())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-layers", "5"], "--num-layers 5: must be divisible by --pipeline-model-parallel-size 2"),
        (["--global-batch-size", "7"], "--global-batch-size 7: must be divisible"),
    ],
)
def test_a_contradiction_is_the_error_of_a_real_run(flags: list[str], words: str) -> None:
    rehearsed = rehearse("pretrain_gpt_per_layer.py", *FLAGS, *flags, processes=8)
    assert rehearsed.error is not None
    assert words in rehearsed.error
