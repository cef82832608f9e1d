"""Freed memory kept for the next request of it, where the C library is glibc. Knows nothing of models.

glibc gives a large tensor's pages back to the kernel when it is freed, and the next pass gets them anew, emptied and one fault at a time.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

KEPT_BYTES = (
    256 * 2**20
)  # of free memory at the heap's end, at most; what lies between pieces in use cannot be given back anyway
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # <malloc.h>
_MMAP_BYTES = 32 * 2**20  # the most that glibc allows: what is larger is mapped on its own, and given back


def keep_freed_memory() -> None:
    """For all of this process and as long as it lives; elsewhere than on glibc it does nothing.

    All threads share a heap from then on: those of other threads cannot keep what they free.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
