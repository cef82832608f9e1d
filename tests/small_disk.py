"""A small disk that can be full: a tmpfs of some megabytes, where this process may mount one (a container of CI often may not)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PIECES = (64 * 1024, 4096, 1)


class SmallDisk:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def full(self, left: int = 0) -> Iterator[Callable[[], None]]:
        """Inside the block, and after calling what it gives, at most `left` bytes are free; each call takes what was freed meanwhile."""
        filler = self.path / ".filler"
        with filler.open("wb", buffering=0) as file:

            def fill() -> None:
                for piece in PIECES:
                    with contextlib.suppress(OSError):
                        while self._free() > left + piece or not left:
                            os.write(file.fileno(), b"x" * piece)

            try:
                yield fill
            finally:
                filler.unlink()

    def _free(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize


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
