"""What the C library does with memory that was given back: kept for the next request instead of returned to the system.

A forward on a CPU asks for the same large pieces again and again; returned each time, their pages are cleared and mapped anew each time.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_PIECE_BYTES, _IDLE_BYTES = 2**30, 2**31 - 1


@cache
def keep_freed_memory() -> None:
    """From here on this process keeps up to 2 GiB that it does not use. Nothing where the C library is not glibc's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _IDLE_BYTES)
