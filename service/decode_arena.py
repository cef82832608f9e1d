"""Memory that the API and one process of its pool share: the bytes of an order and of its answer, where they fit. Knows nothing of images.

A file of memory alone without a name (memfd): no limit of /dev/shm counts for it, and it is gone with the last of the two that maps it.
It is sealed at its size, for whoever cuts a file that another process maps kills that process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence

ARENA_BYTES = 2**24  # a picture of 2048 × 2048 pixels; decoding a larger one takes a hundred times as long as the pipe


class Arena:
    """Used by turns: who has the order or the answer may write, the other one waits to be told."""

    def __init__(self, descriptor: int) -> None:
        """Map the file of `arena_file`; the descriptor stays its owner's."""
        self._map = memoryview(mmap.mmap(descriptor, ARENA_BYTES))

    def put(self, parts: Sequence[bytes]) -> bool:
        """Lay them here one after the other; False, and nothing is laid here, where they do not fit."""
        if sum(map(len, parts)) > ARENA_BYTES:
            return False
        at = 0
        for part in parts:
            self._map[at : at + len(part)] = part
            at += len(part)
        return True

    def get(self, sizes: Sequence[int]) -> Iterator[memoryview]:
        """What lies here, one part after the other; the other process may write over it later. Raises ValueError where so much cannot."""
        if min(sizes, default=0) < 0 or sum(sizes) > ARENA_BYTES:
            raise ValueError("more than the arena holds")
        at = 0
        for size in sizes:
            yield self._map[at : at + size]
            at += size


def arena_file() -> int | None:
    """A descriptor, to be closed when both have mapped it; None where the system has no such files (all go through the pipe there)."""
    try:
        descriptor = os.memfd_create("hscr-decode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # not Linux; or forbidden
        return None
    try:
        os.ftruncate(descriptor, ARENA_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError:  # a sandbox that knows no seals
        os.close(descriptor)
        return None
    return descriptor
