"""A small disk that can be full: a tmpfs of some megabytes, where this process may mount one (a container of CI often may not)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SmallDisk:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def full(self, left: int = 0) -> Iterator[None]:
        """No more than `left` bytes are free inside the block; whatever is freed meanwhile is taken too."""
        filler = self.path / ".filler"
        with filler.open("wb", buffering=0) as file:
            state = os.statvfs(self.path)
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - left))
            if not left:
                with contextlib.suppress(OSError):
                    while True:
                        os.pwrite(file.fileno(), bytes(4096), os.fstat(file.fileno()).st_size)
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk | None]:
    """A tmpfs at `path`; None where it may not be mounted, and `path` is then an ordinary folder."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "hscr-small-disk", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield SmallDisk(path) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)
