"""The directory of an unfinished run, `PREFIX.preprocess/`: its lock, its plan, resumption and publication.

No file in this directory has the name of a dataset. A run publishes its datasets by renaming files; it first writes the
list of renames to disk, with every `.bin` before any `.idx`. So `--resume` can complete a run that was killed between
two renames, and no `.idx` of the new dataset is ever without its `.bin`.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

PLAN, PUBLISH, STATE = "plan.json", "publish.json", "state.json"
_LOCK, _WORKERS_LOCK = "lock", "workers.lock"
_ORPHAN_SECONDS = 60.0


def hold_as_worker(directory: str) -> BinaryIO:
    """Locks a working directory for this worker until the returned file is closed; workers share the lock.

    A worker whose parent was killed may write a moment longer; the next run in this directory waits for it.

    Raises:
        EOFError: the parent has already died, so another run may be using the directory.
    """
    file = open(Path(directory, _WORKERS_LOCK), "wb")  # noqa: SIM115 - held while the process lives
    fcntl.flock(file, fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()
    if (
        parent is not None and parent.pid != os.getppid()
    ):  # the process has a new parent, so the old one has died
        raise EOFError("the parent process is gone")
    return file


class WorkDirectory:
    """The working directory of an output prefix: created, or taken over from a killed run.

    Args:
        output_prefix: `--output-prefix`; missing directories are created.
        plan: the inputs and settings that determine the datasets; a resumed run must have the same plan.
        resume: continue a killed run, if there is one.

    Attributes:
        lock: the lock file, held while this process uses the directory.

    Raises:
        ValueError: another process is writing the same datasets, the run to resume had another plan, or a file is where
            a directory must be.
    """

    def __init__(self, output_prefix: str, plan: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(f"{output_prefix}.preprocess")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"--output-prefix {output_prefix}: {error.filename} is a file, not a directory"
            ) from None
        self.lock = open(self.path / _LOCK, "wb")  # noqa: SIM115 - held until the process ends or `remove`
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"--output-prefix {output_prefix}: another run is writing these datasets ({self.path})"
            ) from None
        self._wait_for_orphans()
        if resume and (self.path / PLAN).is_file():
            self._check_plan(plan)
        else:
            self._clear()
            self._write(PLAN, plan)

    def _wait_for_orphans(self) -> None:
        with open(self.path / _WORKERS_LOCK, "wb") as file:
            deadline = time.monotonic() + _ORPHAN_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        self.release()
                        raise ValueError(
                            f"{self.path}: a worker of a killed run is still writing in it; try again "
                            "when it has ended"
                        ) from None
                    time.sleep(0.05)

    def _check_plan(self, plan: dict[str, Any]) -> None:
        before = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(plan)).items():
            if before.get(name) != value:
                self.release()
                raise ValueError(
                    f"--resume: {name} is {value!r}, but was {before.get(name)!r} in the run to resume; "
                    f"leave out --resume to start from the beginning"
                )

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name not in (_LOCK, _WORKERS_LOCK):
                path.unlink()

    def _write(self, name: str, content: Any) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self.path / name)

    @property
    def is_publishing(self) -> bool:
        """True if the datasets are complete and only their renames remain."""
        return (self.path / PUBLISH).is_file()

    def prepare(self, moves: list[tuple[Path, str]], stale: list[str]) -> None:
        """Writes two lists to disk: the renames to make, in order, and the files of an older dataset to remove
        first.
        """
        self._write(PUBLISH, {"moves": [[str(source), target] for source, target in moves], "stale": stale})

    def publish(self) -> None:
        """Makes the renames that have not been made yet."""
        todo = json.loads((self.path / PUBLISH).read_text(encoding="utf-8"))
        moves = [(Path(source), target) for source, target in todo["moves"]]
        made = {target for source, target in moves if not source.exists()}
        for path in todo["stale"]:
            if path not in made:
                Path(path).unlink(missing_ok=True)
        for source, target in moves:
            if source.exists():
                os.replace(source, target)

    def remove(self) -> None:
        """Removes the directory; if this is interrupted, the remaining files show that the run was published."""
        last = (PLAN, PUBLISH, STATE)
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(
                self.path.iterdir(), key=lambda path: path.name in last and 1 + last.index(path.name)
            ):
                path.unlink(missing_ok=True)
            self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Gives up the lock, so that another process can use the directory."""
        self.lock.close()
