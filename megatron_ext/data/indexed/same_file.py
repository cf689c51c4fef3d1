"""Refuses inputs that name the same file twice (`a` and `./a`, a pattern that also matches it, a symbolic link).

Its text would otherwise count twice in a vocabulary, in a dataset and in training.
"""

import os
from collections.abc import Iterable

from megatron_ext.data.indexed.indexed_files import idx_path


def refuse_same_file(flag: str, files: Iterable[tuple[str, str | int]]) -> None:
    """Compares files by device and inode number.

    Args:
        flag: the flag that names the files, for the error message.
        files: (spelling, path or open file descriptor) of each; missing files are ignored, since reading them fails.

    Raises:
        ValueError: two of them are the same file.
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
    """Compares datasets, given by their prefixes, in the same way."""
    refuse_same_file(flag, ((prefix, idx_path(prefix)) for prefix in prefixes))
