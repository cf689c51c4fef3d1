"""What a kill leaves of a directory, whenever it comes."""

import shutil
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def snapshots(place: str, folder: str, action: Callable[[], Any]) -> list[str]:
    """Copies a directory before each change that an action makes to it, and after it: what a kill then leaves.

    Args:
        place: the directory.
        folder: another one, for the copies.
        action: what changes it.

    Returns:
        The copies in their order.
    """
    copies: list[str] = []
    active = True

    def copy() -> None:
        copies.append(f"{folder}/{len(copies)}")
        shutil.copytree(place, copies[-1])

    def before_change(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal active
        opened = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxa"
        if active and (opened or event in _CHANGES):
            active = False  # the copy changes files too
            copy()
            active = True

    sys.addaudithook(before_change)
    action()
    active = False
    copy()
    return copies
