"""Processes that end with the tests, however those end: who kills pytest must not have to look for its services."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.lifeline import die_with_parent


def started(command: Sequence[str], log: Path, sign: int = signal.SIGKILL, **how: Any) -> subprocess.Popen[bytes]:
    """A child with both outputs in `log`, to which the kernel sends `sign` when this process is gone. Only from its main thread."""
    parent = os.getpid()
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: die_with_parent(parent, sign),
            **how,
        )
