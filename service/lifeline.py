"""A process that must not outlive the one that started it, however that one dies.

On Linux the kernel tells it (PR_SET_PDEATHSIG); elsewhere a thread watches. Knows nothing of jobs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "HSCR_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Ask the kernel for signal `number` when the parent dies. Also safe where the parent died before this call."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def watch_parent() -> None:
    """For a child started with HSCR_PARENT_PID in its environment: die with that process. Without it: nothing."""
    parent = int(os.environ.pop(PARENT_VARIABLE, "0"))
    if not parent:
        return
    die_with_parent(parent)
    if _libc is None:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
