"""Writes a directory atomically: the directory appears under its name only when it is complete.

The directory is written next to its final place under a hidden name, flushed to disk and then renamed. A killed process
leaves only hidden files behind, which the next attempt removes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.training.checkpoint.checkpoint_files import fsync_path


def check_free(target: str | Path, flag: str, *, overwrite: bool = False) -> None:
    """Raises `ValueError` unless a new directory may be written at `target`.

    Args:
        target: path of the output directory.
        flag: the command-line flag that gave `target`, for error messages.
        overwrite: allow existing content, which will be replaced.

    Raises:
        ValueError: `target` is a file, or a directory that is not empty.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {target}: is a file; give a directory that does not exist or is empty")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{flag} {target}: is not empty; give a directory that does not exist or is empty")


@contextlib.contextmanager
def complete_directory(target: str | Path, flag: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory to write into and renames it to `target` when the block ends without an error.

    Args:
        target: path of the output directory; must be empty or not exist, unless `overwrite` is set.
        flag: the command-line flag that gave `target`, for error messages.
        overwrite: replace the content of `target`.

    Raises:
        ValueError: `target` is a file, or a directory that is not empty.
        OSError: the directory cannot be written; no partial output is left.
    """
    check_free(target, flag, overwrite=overwrite)
    path = Path(os.path.abspath(target))
    writing, replaced = (path.with_name(f".{path.name}.{word}") for word in ("writing", "replaced"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (
            replaced.exists() and not path.exists()
        ):  # an earlier process was killed between the two renames at the end of this function
            replaced.rename(path)
        for left_behind in (writing, replaced):
            shutil.rmtree(left_behind, ignore_errors=True)
        writing.mkdir()
        yield writing
        # Flush the content before the rename, or a power failure could leave the new name with empty files.
        for file in writing.rglob("*"):
            fsync_path(file)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        fsync_path(path.parent)  # makes the rename itself durable
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        reason = error.strerror or str(error)
        raise OSError(
            f"{flag} {target}: could not be written ({reason}); no partial output is left"
        ) from error
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
