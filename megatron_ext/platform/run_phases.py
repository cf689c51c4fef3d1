"""Names the phases of a run (the model is built, a step, its update, ...) for an observer such as a rehearsal."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MODEL = "model"
GRADIENTS = "gradient buffers"
OPTIMIZER = "optimizer"
STEP = "step"
FORWARD_BACKWARD = "forward and backward"
UPDATE = "update"
EVALUATION = "evaluation"


class Observer(Protocol):
    """Its methods are called when a phase begins and ends; phases may be nested."""

    def begin(self, phase: str) -> None:
        """Called before a phase."""

    def end(self, phase: str, result: Any) -> None:
        """Called after a phase, with the result of the phase's function; None if the function raised an exception."""


observer: Observer | None = None
"""The observer of this process's run; None in a run that trains."""


def in_phase(phase: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator for the function that carries out a phase."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if observer is None:
                return function(*args, **kwargs)
            result = None
            observer.begin(phase)
            try:
                result = function(*args, **kwargs)
            finally:
                observer.end(phase, result)
            return result

        return call

    return decorate
