"""A directory that appears under its name when it is complete, and not before.

It is written beside its place under a hidden name, forced to the disk and renamed. What a kill leaves behind is hidden
and is removed by the next attempt.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.training.checkpoint.checkpoint_files import fsync_path


def check_free(target: str | Path, flag: str, *, overwrite: bool = False) -> None:
    """Raises unless a directory can be written at `target`.

    Args:
        target: the directory to be.
        flag: the flag that names it, for errors.
        overwrite: what is in it may be replaced.

    Raises:
        ValueError: there is something already.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {target}: a file, not a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{flag} {target}: not empty")


@contextlib.contextmanager
def complete_directory(target: str | Path, flag: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty directory to write into, and puts it in place of `target` when the block ends well.

    Args:
        target: the directory to be; missing or empty, unless `overwrite`.
        flag: the flag that names it, for errors.
        overwrite: replaces what is there.

    Raises:
        ValueError: there is something already.
        OSError: it cannot be written; nothing of it is left.
    """
    check_free(target, flag, overwrite=overwrite)
    path = Path(os.path.abspath(target))
    writing, replaced = (path.with_name(f".{path.name}.{word}") for word in ("writing", "replaced"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not path.exists():  # a kill between the two renames below
            replaced.rename(path)
        for left_behind in (writing, replaced):
            shutil.rmtree(left_behind, ignore_errors=True)
        writing.mkdir()
        yield writing
        for file in writing.rglob("*"):
            fsync_path(file)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        fsync_path(path.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        reason = error.strerror or str(error)
        raise OSError(f"{flag} {target}: could not be written ({reason}); nothing of it is left") from error
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
