"""The folders of runs, DATA/runs/<job>/attempt-<fence>/: where they lie, who holds them, and how they are taken away.

A folder's lock is a flock that a supervisor and every process of its run hold together (worker/attempt.py); helpers, who make parts of the
generation, share another. Nobody removes a folder under a living run or helper. Knows files, nothing of the database.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

LOCK, HELPERS = ".lock", ".helpers"
PARTS = "parts"  # of the generation, as hscr/parts.py names them
_ATTEMPT = re.compile(r"^attempt-(\d+)$")


class Busy(Exception):
    """Some process still holds the folder's lock."""


def folder(data_dir: Path, job_id: str) -> Path:
    return data_dir / "runs" / job_id


def attempts(job_folder: Path) -> list[Path]:
    """Attempt folders of a job, oldest first; none where it was never claimed."""
    if not job_folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in job_folder.iterdir() if (m := _ATTEMPT.match(p.name))]
    return [path for _, path in sorted(found)]


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def helping(data_dir: Path, job_id: str) -> Iterator[int | None]:
    """Hold a job's folder with other helpers while the block lasts; the lock's descriptor, for children that hold it too.

    None where there is no folder (a host that does not share it), or it is being put aside.
    """
    path = folder(data_dir, job_id) / HELPERS
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        yield descriptor if _still_there(path, descriptor) else None
    finally:
        os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    """Whether the lock is ours and its file still in its place: the folder may have been renamed just before."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def put_aside(data_dir: Path, job_id: str) -> Path | None:
    """Rename a job's folder out of the way, for `discard`; None where there is none. Raises Busy."""
    path = folder(data_dir, job_id)
    if not path.is_dir():
        return None
    with (path / LOCK).open("w") as file, (path / HELPERS).open("w") as helpers:
        if not (try_lock(file.fileno()) and try_lock(helpers.fileno())):
            raise Busy(job_id)
        gone = path.with_name(f".gone-{uuid4().hex}")
        path.rename(gone)
    return gone


def discard(path: Path | None) -> None:
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def clear_aside(root: Path) -> int:
    """Remove what was put aside below `root` by a process that died before it had removed it; how many."""
    left = list(root.glob(".gone-*"))
    for path in left:
        discard(path)
    return len(left)
