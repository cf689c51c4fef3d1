"""The engine's cache of sample indices, for several runs and nodes at a time: a file is there whole or not at all.

The engine writes the arrays in place. A run that maps them while another writes them dies of a bus error, and one that
meets half of them fails. Here they are written into a directory apart and moved; whoever has mapped an older file of
the name keeps it. An attempt that fails (a full disk) leaves nothing. Where the data's directory cannot be written to
nothing is kept: every process makes the indices in its own memory.
"""

import copy
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.platform.collectives import on_first_rank

IN_MEMORY = ""
"""mcore's sign that no index is written."""

_BUILDING = ".building-"
_REMAINS_SECONDS = 24 * 3600

T = TypeVar("T")


def choose_cache(data: DataConfig, prefixes: list[str]) -> str:
    """The directory of the sample indices, or `IN_MEMORY`; collective, the first rank decides between the two.

    Args:
        data: `--data-cache-path` is taken as it is.
        prefixes: the datasets; by default the indices lie beside the first.
    """
    if data.data_cache_path is not None:
        return data.data_cache_path
    chosen = on_first_rank(lambda: _beside(prefixes[0]))
    if chosen == IN_MEMORY:  # mcore warns of what is said already
        for name in ("gpt_dataset", "blended_dataset"):
            logging.getLogger(f"megatron.core.datasets.{name}").setLevel(logging.ERROR)
    return chosen


def _beside(prefix: str) -> str:
    path = os.path.join(os.path.dirname(prefix), "index_cache")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        print(
            f"note: {path}: {error.strerror}; every process makes the sample indices in its memory"
            f" (--data-cache-path DIR keeps them)"
        )
        return IN_MEMORY
    return path


def through_cache(dataset: Any, names: Sequence[str], engine: Callable[[], T]) -> T:
    """What `engine` builds or reads, built by rank 0 where the cache lacks a file or holds a truncated one.

    Args:
        dataset: the engine's, whose `config.path_to_cache` names the cache; `IN_MEMORY` for none.
        names: the cache's files for this dataset.
        engine: reads the cache if all files are there, else builds the arrays and writes the files.

    Raises:
        FileNotFoundError: another rank than 0 does not see the files.
        OSError: the cache cannot be written.
    """
    cache = dataset.config.path_to_cache
    if not cache:
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
        reason = error.strerror or os.strerror(errno.ENOSPC)  # numpy reports a short write without a number
        raise OSError(
            f"--data-cache-path {cache}: the sample index cannot be written there ({reason}); give another directory"
        ) from error


def _remove_remains(cache: str) -> None:
    """Removes what killed runs have left; a directory of today may be another run's that is building now."""
    for path in Path(cache).glob(f"{_BUILDING}*"):
        if time.time() - path.stat().st_mtime > _REMAINS_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _build_apart(dataset: Any, cache: str, engine: Callable[[], T]) -> T:
    os.makedirs(cache, exist_ok=True)
    _remove_remains(cache)
    config = dataset.config
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=cache) as folder:
        dataset.config = copy.copy(config)
        dataset.config.path_to_cache = folder
        try:
            built = engine()
        finally:
            dataset.config = config
        for name in os.listdir(folder):
            os.replace(os.path.join(folder, name), os.path.join(cache, name))
    return built
