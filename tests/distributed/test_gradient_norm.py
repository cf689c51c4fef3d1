"""The gradients' global norm and number of zeros on the device are the engine's, which reads them on the host."""

from itertools import islice

import pytest

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES, synthetic_batches
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.gradient_norms import gradient_norm, zeros_in_gradient
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper


def _norms(parallel: ParallelConfig, bf16: bool) -> tuple[float, float, int, float, float]:
    """The two norms of one step's gradients, how many of this rank's gradients do not count, and two counts of zeros.

    TINY ties the embedding to the output layer, so under pipeline parallelism two stages have it.
    """
    initialize(parallel, seed=1)
    per_layer = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=8,
        per_layer_strategy="identity",
        per_layer_vocab_size=VOCAB_SIZE,
    )
    family = PerLayerFamily(per_layer, VOCAB_SIZE)
    chunks = wrap_model(
        build_model(
            TINY,
            parallel,
            vocab_size=VOCAB_SIZE,
            seed=1,
            precision="bf16" if bf16 else "fp32",
            extensions=[family.extension()],
        ),
        parallel,
        precision="bf16" if bf16 else "fp32",
    )
    settings = OptimizerSettings(lr=1e-2)
    optimizer = build_optimizer(settings, parallel, chunks, [family], precision="bf16" if bf16 else "fp32")
    stepper = Stepper(
        chunks,
        [family],
        optimizer,
        build_scheduler(settings, TrainingConfig(train_iters=2), optimizer, 4),
        global_batch_size=4,
        micro_batch_size=1,
        clip_grad=0.0,
    )
    stepper.forward_backward(synthetic_batches(TINY.seq_length))
    optimizer.prepare_grads()
    parts = optimizer.chained_optimizers
    # megatron-core 0.19 has the second name.
    names = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")
    counted = next(name for name in names if hasattr(optimizer, name))
    left_out = sum(len(part.get_parameters()) - len(getattr(part, counted)()) for part in parts)
    norms = float(gradient_norm(optimizer)), float(optimizer.get_grad_norm())
    return *norms, left_out, float(zeros_in_gradient(optimizer)), float(optimizer.count_zeros())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_is_the_engines_at_every_layout(layout: str, bf16: bool) -> None:
    found = run_distributed(_norms, WORLD_SIZES[layout], LAYOUTS[layout], bf16)
    ours, engines, left_out, zeros, engines_zeros = zip(*found, strict=True)
    assert len(set(ours)) == 1 and ours[0] > 0
    assert ours == pytest.approx(engines, rel=1e-6)
    if "TP2" in layout or "PP2" in layout:
        assert max(left_out) > 0, "duplicates were to be left out"
    assert zeros == engines_zeros
    if not bf16:  # the rows of the per-layer tables whose tokens are not in the batch
        assert set(zeros) == {(VOCAB_SIZE - run_single(_number_of_tokens)) * 8 * TINY.num_layers}


def _number_of_tokens() -> int:
    """How many tokens of the vocabulary are in the batch."""
    initialize(ParallelConfig(), seed=1)
    batches = islice(synthetic_batches(TINY.seq_length), 4)
    return len({token for batch in batches for token in batch["tokens"].flatten().tolist()})
