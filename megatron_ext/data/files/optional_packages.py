"""Imports packages that only some inputs and tokenizers need; the extra `megatron-ext[data]` installs these
packages.
"""

import importlib
from typing import Any


def import_optional(module: str, needed_for: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: dotted name of the module.
        needed_for: the flag and value that need the package, for the error message.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{needed_for}: the package {error.name} is not installed (it comes with megatron-ext[data])"
        ) from None
