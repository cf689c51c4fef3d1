"""Chooses time steps t = 0 .. T - 1, and computes the fraction of tokens that is masked at a time step.

    fraction(t) = min + (max - min) t / (T - 1)                  by default from 0.15 to 0.9

The choice of t depends on --time-interpretation; a stack is a group of layers that are trained together:

    depth    t depends on the stack's index i (--stack-time-mapping):
             linear         min(i * time_per_stack, T - 1)
             exponential    min(floor(time_per_stack * e^(i/2)), T - 1)
             custom         the result of a function (stack_idx, max_stacks, num_time_steps) -> t
    input    t is random for every sequence: t = floor(u T) with u ~ U[0, 1]; see `masking` and `time_embedding`

Source: docs/design/progressive_growth.md.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig

TIME_STEP = "time_step"
"""Name of the batch field with each sequence's time step, integer [b], which is also an input of the model."""


def time_step_of_stack(config: ProgressiveConfig, stack_idx: int) -> int:
    """Returns the time step of a stack with `--time-interpretation depth`.

    Args:
        config: contains the mapping from stacks to time steps, and the number of time steps.
        stack_idx: index of the stack in the order of creation, from 0.

    Raises:
        ValueError: the custom function cannot be found, or returns an invalid time step.
    """
    steps = config.resolved_num_time_steps
    if config.stack_time_mapping == "linear":
        return min(stack_idx * config.time_per_stack, steps - 1)
    if config.stack_time_mapping == "exponential":
        return min(math.floor(config.time_per_stack * math.exp(stack_idx / 2)), steps - 1)
    name = config.custom_time_mapping or ""
    found = load_function(name, "--custom-time-mapping")(stack_idx, config.max_stacks, steps)
    if not isinstance(found, int) or not 0 <= found < steps:
        raise ValueError(
            f"--custom-time-mapping {name}: returned {found!r} for stack {stack_idx}; "
            f"it must return an integer from 0 to {steps - 1}"
        )
    return found


def mask_fraction(config: ProgressiveConfig, time_step: torch.Tensor) -> torch.Tensor:
    """Returns the fraction of tokens that is masked at each time step, as float64 in the shape of `time_step`."""
    last = max(1, config.resolved_num_time_steps - 1)
    span = config.max_mask_fraction - config.min_mask_fraction
    return config.min_mask_fraction + span * time_step.double() / last


def time_step_of_fraction(config: ProgressiveConfig, fraction: float) -> int:
    """Returns the time step at which about `fraction` of the tokens are masked (the inverse of `mask_fraction`)."""
    last = config.resolved_num_time_steps - 1
    span = config.max_mask_fraction - config.min_mask_fraction
    if span == 0:
        return last
    return min(last, max(0, round((fraction - config.min_mask_fraction) / span * last)))


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """Imports a function that the user has named.

    Args:
        name: name in the form `package.module.function`.
        flag: the flag whose value is `name`, for the error message.

    Raises:
        ValueError: the module or the function does not exist.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{flag} {name}: this function cannot be imported: {error}") from None
    if not callable(function):
        raise ValueError(f"{flag} {name}: is not a function")
    return function
