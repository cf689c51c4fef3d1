"""The engine's cache of sample indices, for several runs and nodes at a time: a file is there whole or not at all.

The engine writes the arrays in place. A run that maps them while another writes them dies of a bus error, and one that
meets half of them fails. Here they are written into a directory apart and moved; whoever has mapped an older file of
the name keeps it.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def through_cache(dataset: Any, names: Sequence[str], engine: Callable[[], T]) -> T:
    """What `engine` builds or reads, built by rank 0 where the cache lacks a file or holds a truncated one.

    Args:
        dataset: the engine's, whose `config.path_to_cache` names the cache; None for no cache.
        names: the cache's files for this dataset.
        engine: reads the cache if all files are there, else builds the arrays and writes the files.

    Raises:
        FileNotFoundError: another rank than 0 does not see the files.
        OSError: the cache cannot be written.
    """
    cache = dataset.config.path_to_cache
    if cache is None:
        return engine()
    missing = [name for name in names if not os.path.isfile(os.path.join(cache, name))]
    if dist.is_initialized() and dist.get_rank() != 0:
        if missing:
            raise FileNotFoundError(
                f"--data-cache-path {cache}: rank {dist.get_rank()} does not see {missing[0]}, which rank 0 has "
                "written there; give a directory on storage that all nodes share"
            )
        return engine()
    if not missing:
        try:
            return engine()
        except (ValueError, EOFError):  # a machine that went down has left a file truncated
            pass
    try:
        return _build_apart(dataset, cache, engine)
    except OSError as error:
        raise OSError(
            f"--data-cache-path {cache}: the sample index cannot be written there ({error}); give another directory"
        ) from error


def _build_apart(dataset: Any, cache: str, engine: Callable[[], T]) -> T:
    os.makedirs(cache, exist_ok=True)
    config = dataset.config
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as folder:
        dataset.config = copy.copy(config)
        dataset.config.path_to_cache = folder
        try:
            built = engine()
        finally:
            dataset.config = config
        for name in os.listdir(folder):
            os.replace(os.path.join(folder, name), os.path.join(cache, name))
    return built
