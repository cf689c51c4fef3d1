"""A file whose checksum is computed while it is written, so that it need not be read again."""

import hashlib
import io
import threading
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
"""Number of bytes in a block, which is hashed and then written. A block of this size is still in the processor's cache
when it is written.
"""


class WritingCancelled(Exception):
    """Raised by a write after the save was cancelled."""


class HashedFile(io.FileIO):
    """A new file that hashes the written bytes."""

    # The file has no buffer, because a loader process that is forked during a write would inherit the buffer's
    # content and could write it a second time.

    def __init__(self, path: Path, cancelled: threading.Event) -> None:
        """Args:
        path: the file; an existing file is replaced.
        cancelled: after this event is set, the next write raises `WritingCancelled`.
        """
        super().__init__(path, "w")
        self._cancelled = cancelled
        self._sha = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Appends all of `data`, and returns its size in bytes."""
        view = block = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _BLOCK):
                if self._cancelled.is_set():
                    raise WritingCancelled
                block = view[start : start + _BLOCK]
                self._sha.update(block)
                self._size += len(block)
                while block:  # the system may write only a part of the block
                    block = block[super().write(block) :]
        except BaseException:
            # Release the views, which the traceback would keep: Python 3.13 prints an error when it collects a buffer
            # that still has views.
            for part in (block, view, data):
                if isinstance(part, memoryview):
                    part.release()
            raise
        return len(view)

    def flush(self) -> None:
        # torch's wrapper of the file flushes again when it is collected, possibly after the file is closed; Python
        # 3.13 would print the error.
        if not self.closed:
            super().flush()

    def digest(self) -> dict[str, Any]:
        """Returns the sha256 and the size of the written bytes, as listed in the manifest."""
        return {"sha256": self._sha.hexdigest(), "size": self._size}
