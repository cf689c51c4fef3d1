"""Every shape of the learning rate's decay is its formula, at every step of a run."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.training.engine.lr_schedule import build_scheduler

STEPS, WARMUP, BATCH = 40, 8, 4
PEAK, END = 0.1, 0.02

FORMULAS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: PEAK,
    "linear": lambda step: END + (PEAK - END) * (1 - (step - WARMUP) / (STEPS - WARMUP)),
    "cosine": lambda step: (
        END + (PEAK - END) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    ),
    "inverse-square-root": lambda step: max(END, PEAK * math.sqrt(WARMUP / step)),
    "WSD": lambda step: PEAK if step <= STEPS - 10 else END + (PEAK - END) * (STEPS - step) / 10,
}


def test_every_shape_has_a_formula_here() -> None:
    assert set(get_args(get_type_hints(OptimizerSettings)["lr_decay_style"])) == set(FORMULAS)


@pytest.mark.parametrize("shape", FORMULAS)
def test_the_learning_rate_is_that_of_the_shapes_formula(shape: str) -> None:
    more: dict[str, Any] = (
        {"lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "linear"} if shape == "WSD" else {}
    )
    settings = OptimizerSettings(
        lr=PEAK,
        min_lr=END,
        lr_decay_style=shape,  # type: ignore[arg-type]  # a name of FORMULAS
        lr_warmup_iters=WARMUP,
        **more,
    )
    group = {"max_lr": PEAK, "min_lr": END, "lr_mult": 1.0, "wd_mult": 1.0}
    optimizer: Any = SimpleNamespace(param_groups=[group])
    training = TrainingConfig(train_iters=STEPS, global_batch_size=BATCH)
    scheduler = build_scheduler(settings, training, optimizer, BATCH)
    rates = []
    for _ in range(STEPS):
        rates.append(group["lr"])
        scheduler.step(BATCH)
    warmup = [PEAK * step / WARMUP for step in range(WARMUP)]
    expected = [*warmup, *(FORMULAS[shape](step) for step in range(WARMUP, STEPS))]
    assert rates == pytest.approx(expected, rel=1e-12)
