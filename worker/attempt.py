"""The folder of one attempt: DATA/runs/<job>/attempt-<fence>/, under the job's lock.

The lock is a flock whose file the run inherits: it is free only when the supervisor *and* every process of its run are gone. So a run
that outlives its supervisor blocks the next attempt instead of writing beside it (a fencing token guards rows, not files).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import run_folders


class JobFolder:
    """Everything a job has on disk."""

    def __init__(self, data_dir: Path, job_id: str) -> None:
        self.path = run_folders.folder(data_dir, job_id)
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock_file(self) -> Iterator[int]:
        """The open lock file, not yet locked; closing it gives up this process's hold only."""
        with (self.path / run_folders.LOCK).open("w") as file:
            yield file.fileno()

    def attempts(self) -> list[Path]:
        """Attempt folders, oldest first."""
        return run_folders.attempts(self.path)

    def begin(self, fence: int) -> Path:
        """This attempt's folder: a copy of the last one, so that the run goes on from there; older ones are removed. Needs the lock."""
        final = self.path / f"attempt-{fence}"
        for leftover in self.path.glob(".attempt-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        earlier = self.attempts()
        if earlier:
            temporary = self.path / f".attempt-{fence}"
            try:
                shutil.copytree(earlier[-1], temporary, symlinks=True, ignore=shutil.ignore_patterns(".lock", "*.tmp"))
            except OSError:  # a full disk needs the room of what is no use
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            temporary.rename(final)
            for path in earlier:
                shutil.rmtree(path, ignore_errors=True)
        else:
            final.mkdir()
        return final

    def trim(self) -> None:
        """Keep of a job that will not go on what people look at: not its checkpoints, not a second copy of its adapter. Needs the lock."""
        for leftover in (*self.path.glob(".attempt-*"), self.path / run_folders.PARTS):
            shutil.rmtree(leftover, ignore_errors=True)
        for attempt in self.attempts():
            for folder in (p for p in attempt.iterdir() if p.is_dir()):
                shutil.rmtree(folder, ignore_errors=True)
