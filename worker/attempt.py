"""The folder of one attempt: DATA/runs/<job>/attempt-<fence>/, under the job's lock.

The lock is a flock whose file the run inherits: it is free only when the supervisor *and* every process of its run are gone. So a run
that outlives its supervisor blocks the next attempt instead of writing beside it (a fencing token guards rows, not files).
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import runs


class JobFolder:
    """Everything a job has on disk."""

    def __init__(self, data_dir: Path, job_id: str) -> None:
        self.path = runs.folder(data_dir, job_id)
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock_file(self) -> Iterator[int]:
        """The open lock file, not yet locked; closing it gives up this process's hold only."""
        with (self.path / ".lock").open("w") as file:
            yield file.fileno()

    def attempts(self) -> list[Path]:
        """Attempt folders, oldest first."""
        return runs.attempts(self.path)

    def begin(self, fence: int) -> Path:
        """This attempt's folder: a copy of the last one, so that the run goes on from there; older ones are removed. Needs the lock."""
        final = self.path / f"attempt-{fence}"
        for leftover in self.path.glob(".attempt-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        earlier = self.attempts()
        if earlier:
            temporary = self.path / f".attempt-{fence}"
            shutil.copytree(earlier[-1], temporary, symlinks=True, ignore=shutil.ignore_patterns(".lock", "*.tmp"))
            temporary.rename(final)
            for path in earlier:
                shutil.rmtree(path, ignore_errors=True)
        else:
            final.mkdir()
        return final


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
