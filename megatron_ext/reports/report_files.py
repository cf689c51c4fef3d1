"""Checks that a report can be written before the work for it begins, and writes reports atomically."""

import os
from pathlib import Path


def check_report_writable(flag: str, path: str | Path) -> None:
    """Raises `OSError` unless a file can be written at `path`; folders may be missing: `write_report` creates them."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{flag} {path}: is a directory; give the path of a file")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{flag} {path}: {folder} is a file, not a directory")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise PermissionError(f"{flag} {path}: no permission to write")


def write_report(path: str | Path, text: str) -> None:
    """Writes a file atomically (under another name, then renamed) and creates missing folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise OSError(
            error.errno, error.strerror, str(target)
        ) from None  # the error of a full disk does not contain the file's name
    finally:
        part.unlink(missing_ok=True)
