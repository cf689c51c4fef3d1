"""Layer-parallel training, against the curriculum's teacher stage, which computes the same by running the student."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.layer_parallel import states_bytes
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch

MODEL = replace(TINY, init_method_std=0.1)
LOW_RANK = NPTModuleConfig(np_target="gate+up+down", np_rank=8, npt_layers="1,2")
OUTER = replace(LOW_RANK, np_form="outer_product", np_target="gate+up", np_residual="keep")
KEY_VALUE = replace(LOW_RANK, np_form="key_value", np_init_scale=0.1)
SETTINGS = {"low_rank, drop": LOW_RANK, "outer_product, keep": OUTER, "key_value, drop": KEY_VALUE}
WEIGHTS: dict[str, Any] = {
    "direct_mlp_weight": 1.0,
    "equivalence_weight": 0.5,
    "regularization_weight": 0.1,
    "layer_weights": "linear",
    "npt_log_interval": 1,
}
LAYER_PARALLEL = NPTTrainingConfig(mode="layer_parallel", **WEIGHTS)
TEACHER_STAGE = NPTTrainingConfig(
    mode="multi_layer", curriculum_stages="teacher:1", fidelity_weight=0.0, **WEIGHTS
)
CACHED = replace(LAYER_PARALLEL, teacher_cache_gb=1.0, teacher_cache_steps=1, teacher_cache_passes=2)


@dataclass
class Steps:
    """What some steps on the same batches computed."""

    values: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    """For every step, how often each layer's attention ran."""

    events: list[str] = field(default_factory=list)
    """The NP modules' forward passes and gradients, in order."""

    cached_bytes: int = 0


def _masked_batches() -> Iterator[Batch]:
    """Yields the same four micro-batches of two sequences for ever; half of the tokens are masked."""
    batches = synthetic_batches(MODEL.seq_length, micro_batch_size=2, global_batch_size=8)
    chosen = [next(batches) for _ in range(4)]
    for place, batch in enumerate(chosen):
        batch["loss_mask"] = (
            (torch.arange(MODEL.seq_length) % 2 == place % 2).float().expand(2, -1).contiguous()
        )
    while True:
        yield from chosen


def _steps(settings: NPTModuleConfig, training: NPTTrainingConfig, steps: int = 1) -> Steps:
    parallel = ParallelConfig()
    initialize(parallel, seed=1)
    family = NPTFamily(settings, training, total_steps=steps)
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()])
    family.prepare_model(chunks)
    found = Steps()
    counts = [0] * MODEL.num_layers
    _watch(chunks[0], counts, found.events)
    wrapped = wrap_model(chunks, parallel)
    rate = OptimizerSettings(lr=1e-3, lr_decay_style="constant")
    optimizer = build_optimizer(rate, parallel, wrapped, [family])
    scheduler = build_scheduler(rate, TrainingConfig(train_iters=steps), optimizer, 8)
    stepper = Stepper(
        wrapped, [family], optimizer, scheduler, global_batch_size=8, micro_batch_size=2, clip_grad=0.0
    )
    batches = _masked_batches()
    for iteration in range(1, steps + 1):
        family.begin_step(chunks, iteration)
        counts[:] = [0] * MODEL.num_layers
        found.values.append(stepper.forward_backward(batches).read()[1])
        found.gradients.append(
            {name: p.main_grad.clone() for name, p in chunks[0].named_parameters() if p.requires_grad}
        )
        found.runs.append(list(counts))
    found.cached_bytes = family.teacher.cache.bytes
    return found


def _watch(chunk: GPTModel, counts: list[int], events: list[str]) -> None:
    def count(number: int) -> None:
        counts[number] += 1

    for number, layer in enumerate(chunk.decoder.layers):
        layer.self_attention.register_forward_hook(lambda *_, number=number: count(number))
    for number, module in np_modules([chunk]).items():
        module.register_forward_pre_hook(lambda *_, number=number: events.append(f"forward {number}"))
        first = next(module.parameters())
        first.register_hook(lambda _, number=number: events.append(f"gradient {number}"))


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_the_curriculums_teacher_stage(name: str) -> None:
    found = run_single(_steps, SETTINGS[name], LAYER_PARALLEL)
    expected = run_single(_steps, SETTINGS[name], TEACHER_STAGE)
    (values,), (reference,) = found.values, expected.values
    assert (
        values.keys() == reference.keys() and {"mlp_direct_loss/layer_1", "npt_loss/layer_2"} <= values.keys()
    )
    assert values == pytest.approx(reference, rel=1e-5)
    (gradients,), (others,) = found.gradients, expected.gradients
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, others[key], rtol=1e-4, atol=1e-7)


def test_each_layer_up_to_the_last_trained_one_runs_once_and_no_other() -> None:
    found = run_single(_steps, LOW_RANK, LAYER_PARALLEL)
    assert found.runs == [[4, 4, 4, 0]]


def test_a_layers_graph_is_gone_before_the_next_layers_is_built() -> None:
    found = run_single(_steps, LOW_RANK, LAYER_PARALLEL)
    one = ["forward 1", "gradient 1", "forward 2", "gradient 2"]
    assert found.events == 4 * one


def test_a_later_pass_computes_the_same_from_the_cache_without_the_teacher_until_new_samples_come() -> None:
    found = run_single(_steps, LOW_RANK, CACHED, 3)
    assert found.runs == [[4, 4, 4, 0], [0] * 4, [4, 4, 4, 0]]
    for gradients, values in zip(found.gradients[1:], found.values[1:], strict=True):
        assert values == found.values[0]
        assert all(torch.equal(gradients[key], found.gradients[0][key]) for key in gradients)
    exact = run_single(_steps, LOW_RANK, LAYER_PARALLEL)
    assert found.values[0] == pytest.approx(exact.values[0], rel=0.02)
    tokens = 8 * MODEL.seq_length
    assert found.cached_bytes == tokens * states_bytes(MODEL, ParallelConfig(), (1, 2))


def test_the_states_of_a_rank_are_those_of_its_stages_layers() -> None:
    whole = states_bytes(MODEL, ParallelConfig(), (0, 1, 2, 3))
    assert whole == 4 * 3 * MODEL.hidden_size * 2
    two = ParallelConfig(pipeline_model_parallel_size=2)
    assert states_bytes(MODEL, two, (1, 2, 3)) == whole / 2
    interleaved = replace(two, num_layers_per_virtual_pipeline_stage=1)
    assert states_bytes(MODEL, interleaved, (0, 2)) == whole / 2
    assert states_bytes(MODEL, interleaved, (0, 1)) == whole / 4
    split = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert states_bytes(MODEL, split, (0, 1, 2, 3)) == whole / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fidelity_weight": 1.0}, r"^--fidelity-weight 1: this loss needs the model's logits"),
        ({"lm_weight": 0.5}, r"^--lm-weight 0.5: this loss needs the model's logits"),
        ({"curriculum_stages": "student:4"}, r"^--curriculum-stages student:4: .* always the teacher's"),
        ({"layer_losses": "document"}, r"^--layer-losses document: not supported by --mode layer_parallel"),
        (
            {"teacher_cache_steps": 4},
            r"^--teacher-cache-steps 4: requires --teacher-cache-passes of at least 2",
        ),
        ({"teacher_cache_passes": 4}, r"^--teacher-cache-passes 4: requires --teacher-cache-steps$"),
    ],
)
def test_flags_that_the_mode_does_not_support_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPTTrainingConfig(mode="layer_parallel", **flags)


def test_other_modes_refuse_the_flags_of_the_mode_and_the_mode_a_trained_base() -> None:
    with pytest.raises(
        ValueError, match=r"^--teacher-cache-steps 4: requires --mode layer_parallel \(got lm\)"
    ):
        NPTTrainingConfig(mode="lm", teacher_cache_steps=4, teacher_cache_passes=2)
    with pytest.raises(ValueError, match="^--no-freeze-base: not supported by --mode layer_parallel"):
        LAYER_PARALLEL.check_module(replace(LOW_RANK, freeze_base=False), 4)
