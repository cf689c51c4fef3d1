"""What a dry run counts for tables that are trained by rows, against the tensors of a run."""

from dataclasses import replace

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.activation_memory import ParallelLayout
from megatron_ext.models.costs.memory_estimate import StageMemory, estimate_memory
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.per_layer.sparse.row_optimizer import RowOptimizer
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.interface.own_optimizer import own_optimizers

_ROWS = 1000
_DENSE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=_ROWS, per_layer_hidden_size=8)
_SPARSE = replace(_DENSE, per_layer_sparse=True)
_ELEMENTS = TINY.num_layers * _ROWS * 8


def _family(settings: PerLayerConfig) -> PerLayerFamily:
    return PerLayerFamily(settings, VOCAB_SIZE, [3 * token for token in range(VOCAB_SIZE)])


def _planned(settings: PerLayerConfig, bf16: bool, *, divides: bool = False) -> StageMemory:
    parallel = ParallelConfig(use_distributed_optimizer=divides)
    layout = ParallelLayout(
        model=TINY,
        parallel=parallel,
        vocab_size=VOCAB_SIZE,
        micro_batch_size=1,
        num_microbatches=2,
        data_parallel_size=2,
        precision="bf16" if bf16 else "fp32",
    )
    family = _family(settings)
    cost = family.cost(TINY)
    trained = cost.trained_parameters - cost.trained_apart
    return estimate_memory(layout, cost.parameters, trained, [family.activations(layout, 1)])[0]


def _bytes_of_run(settings: PerLayerConfig, bf16: bool) -> tuple[int, int]:
    """Bytes of the tables' state, and of what a step holds of its rows; and how many rows these are."""
    run = TinyRun(
        RunSettings(
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(),
            make_families=lambda: [_family(settings)],
            precision="bf16" if bf16 else "fp32",
        )
    )
    run.stepper.forward_backward(run._batches)
    (rows,) = own_optimizers(run.optimizer)
    state = [tensor for held in rows.held() for tensor in held.tensors.values()]
    assert isinstance(rows, RowOptimizer)
    step = rows._rows
    assert step is not None
    own_inputs = step.inputs if bf16 else []  # in fp32 these are the copied weights themselves
    in_step = [step.weights, step.gradient, *step.state.values(), *own_inputs]
    assert step.ids.numel() <= 4 * TINY.seq_length
    per_row = sum(tensor.numel() * tensor.element_size() for tensor in in_step) // step.ids.numel()
    return sum(tensor.numel() * tensor.element_size() for tensor in state), per_row


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["adam", "lazy_adam", "rowwise_adagrad", "sgd"])
def test_the_plan_counts_the_tables_state_and_the_rows_of_a_step(name: str, bf16: bool) -> None:
    settings = replace(_SPARSE, per_layer_optimizer=name)  # type: ignore[arg-type]
    whole, rows = _planned(_DENSE, bf16), _planned(settings, bf16)
    state, of_row = run_single(_bytes_of_run, settings, bf16)
    assert rows.parameter_bytes == whole.parameter_bytes
    assert whole.gradient_bytes - rows.gradient_bytes == 4 * _ELEMENTS
    assert rows.optimizer_bytes - (whole.optimizer_bytes - (12 if bf16 else 8) * _ELEMENTS) == state
    assert rows.temporary_bytes - whole.temporary_bytes == 4 * TINY.seq_length * of_row


@pytest.mark.parametrize("bf16", [False, True])
def test_of_tables_off_the_device_the_plan_counts_a_steps_rows_only(bf16: bool) -> None:
    on_device, off = (
        _planned(replace(_SPARSE, per_layer_offload=place), bf16, divides=True) for place in (None, "disk")
    )
    assert on_device.parameter_bytes - off.parameter_bytes == (2 if bf16 else 4) * _ELEMENTS
    # Two moments, and in bf16 main weights, which two ranks would divide.
    assert on_device.optimizer_bytes - off.optimizer_bytes == (12 if bf16 else 8) * _ELEMENTS / 2
    # Every rank computes the update of all rows.
    assert off.temporary_bytes == _planned(_SPARSE, bf16).temporary_bytes


def test_data_parallel_ranks_divide_the_state_under_the_distributed_optimizer() -> None:
    whole, rows = (_planned(settings, True, divides=True) for settings in (_DENSE, _SPARSE))
    assert rows.optimizer_bytes == whole.optimizer_bytes
    assert rows.temporary_bytes < _planned(_SPARSE, True).temporary_bytes
