"""Refuses to read one file twice under two names (`a` and `./a`, a pattern that matches it too, a symbolic link):
its text would count twice in a vocabulary, in a dataset and in training.
"""

import os
from collections.abc import Iterable

from megatron_ext.data.indexed.indexed_files import idx_path


def refuse_same_file(flag: str, files: Iterable[tuple[str, str | int]]) -> None:
    """Compares files by what the system knows them as.

    Args:
        flag: where they were given.
        files: (as it was spelled, path or open file descriptor) of each; one that does not exist is left to its reader.

    Raises:
        ValueError: two are the same file.
    """
    seen: dict[tuple[int, int], str] = {}
    for name, path in files:
        try:
            status = os.stat(path)
        except OSError:
            continue
        file = status.st_dev, status.st_ino
        if file in seen:
            raise ValueError(f"{flag}: {seen[file]} and {name} are the same file; give it once")
        seen[file] = name


def refuse_same_dataset(flag: str, prefixes: Iterable[str]) -> None:
    """The same for datasets, given by their prefixes."""
    refuse_same_file(flag, ((prefix, idx_path(prefix)) for prefix in prefixes))
