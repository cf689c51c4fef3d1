"""Refuses inputs that name one file twice, for example as `a` and `./a`, by name and by pattern, or by a symbolic
link.

Otherwise, the file's text would count twice in a vocabulary, in a dataset and in training.
"""

import os
from collections.abc import Iterable

from megatron_ext.data.indexed.indexed_files import idx_path


def refuse_same_file(flag: str, files: Iterable[tuple[str, str | int]]) -> None:
    """Refuses a list of files that names the same file twice; compares files by device and inode number.

    Args:
        flag: the flag that names the files, for the error message.
        files: for each file, its name in messages and its path or open descriptor. Missing files are ignored here,
            because a later step reports them.

    Raises:
        ValueError: two of the files are the same file.
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
    """Refuses a list of prefixes that names the same dataset twice; compares the index files."""
    refuse_same_file(flag, ((prefix, idx_path(prefix)) for prefix in prefixes))
