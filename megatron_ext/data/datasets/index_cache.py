"""Makes mcore's cache of sample indices safe for several runs and nodes at once: no file is ever incomplete.

mcore writes the index arrays in place. A run that memory-maps the arrays while another run writes them dies of a bus
error, and a run that finds only some of the arrays fails. Here the arrays are written into a temporary directory and
then moved into the cache; a run that has mapped an older file of the same name keeps that file. A failed attempt (a
full disk) leaves no file. If the data's directory is not writable, there is no cache: every process builds the
indices in its own memory.
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
"""Cache path that makes mcore keep the indices in memory and write no file."""

_BUILDING = ".building-"
_REMAINS_SECONDS = 24 * 3600

T = TypeVar("T")


def choose_cache(data: DataConfig, prefixes: list[str]) -> str:
    """Returns the directory of the sample indices, or `IN_MEMORY`. Collective: every rank gets the first rank's
    choice.

    Args:
        data: the data flags; `--data-cache-path` is used if it is given.
        prefixes: the datasets; by default, the directory is `index_cache` beside the first one.
    """
    if data.data_cache_path is not None:
        return data.data_cache_path
    chosen = on_first_rank(lambda: _beside(prefixes[0]))
    if chosen == IN_MEMORY:
        silence_mcore()  # because `_beside` has already printed a note
    return chosen


def silence_mcore() -> None:
    """Silences mcore's warning that it keeps no index on disk."""
    for name in ("gpt_dataset", "blended_dataset"):
        logging.getLogger(f"megatron.core.datasets.{name}").setLevel(logging.ERROR)


def _beside(prefix: str) -> str:
    path = os.path.join(os.path.dirname(prefix), "index_cache")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        print(
            f"note: {path}: {error.strerror}; every process builds the sample indices in its own memory"
            f" (with --data-cache-path DIR they are kept on disk)"
        )
        return IN_MEMORY
    return path


def through_cache(dataset: Any, names: Sequence[str], engine: Callable[[], T]) -> T:
    """Returns the arrays that `engine` reads from the cache; rank 0 builds the cache if a file is missing or damaged.

    Args:
        dataset: mcore's dataset; its `config.path_to_cache` names the cache, or is `IN_MEMORY`.
        names: names of this dataset's files in the cache.
        engine: mcore's method; reads the cache if all files exist, otherwise builds the arrays and writes the files.

    Raises:
        FileNotFoundError: a rank other than 0 does not see the files that rank 0 wrote.
        OSError: the cache cannot be written.
    """
    cache = dataset.config.path_to_cache
    if not cache:
        return engine()
    missing = [name for name in names if not os.path.isfile(os.path.join(cache, name))]
    if dist.is_initialized() and dist.get_rank() != 0:
        if missing:
            raise FileNotFoundError(
                f"{cache}: rank {dist.get_rank()} does not see {missing[0]}, which rank 0 has written there; "
                "give --data-cache-path a directory on storage that all nodes share"
            )
        return engine()
    if not missing:
        try:
            return engine()
        except (ValueError, EOFError):  # the file was truncated when a machine crashed
            pass
    try:
        return _build_apart(dataset, cache, engine)
    except OSError as error:
        reason = error.strerror or os.strerror(errno.ENOSPC)  # numpy's error for a short write has no errno
        raise OSError(
            f"{cache}: the sample index cannot be written there ({reason}); give --data-cache-path another directory"
        ) from error


def _remove_remains(cache: str) -> None:
    """Removes temporary directories of killed runs that are at least a day old; newer ones may still be in use."""
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
