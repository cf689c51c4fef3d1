"""A file whose checksum is computed while it is written, so that it need not be read again."""

import hashlib
import io
import threading
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
"""Bytes that are hashed and written at once: a block is still in the processor's cache when it is written."""


class WritingCancelled(Exception):
    """The file is no longer wanted."""


class HashedFile(io.FileIO):
    """A new file that hashes what is written to it."""

    # It has no buffer: a loader process that is forked during a write would inherit the buffer's content and could
    # write it a second time.

    def __init__(self, path: Path, cancelled: threading.Event) -> None:
        """Args:
        path: the file; an existing one is replaced.
        cancelled: once it is set, the next write raises `WritingCancelled`.
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
                while block:  # the system may write a part only
                    block = block[super().write(block) :]
        except BaseException:
            # The traceback keeps these views; Python 3.13 prints an error when it collects a buffer with views of it.
            for part in (block, view, data):
                if isinstance(part, memoryview):
                    part.release()
            raise
        return len(view)

    def flush(self) -> None:
        # torch's wrapper of the file flushes once more when it is collected, which may be after the file is closed;
        # Python 3.13 prints the error.
        if not self.closed:
            super().flush()

    def digest(self) -> dict[str, Any]:
        """Returns the sha256 and the size of what has been written, as the manifest lists them."""
        return {"sha256": self._sha.hexdigest(), "size": self._size}
