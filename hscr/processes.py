"""Several processes that optimise one adapter together: each scores its share of a step's records, gradients are added up (data parallel).

The first process does everything else, writes all files and says what happens; the others follow it. Rendezvous and backend (NCCL, gloo)
are accelerate's. Without other processes every call here does nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Refuse = Callable[[str, str], object]  # given a code and a message
Followers = Sequence[tuple[subprocess.Popen[bytes], IO[bytes]]]  # each with the file that holds what it said
# The followers wait while the first process generates and evaluates.
PATIENCE = timedelta(days=30)
GRACE_S = 3.0  # an exchange with a process that is gone fails within that, if it does
_over = threading.Event()  # nothing is exchanged with the followers any more


@cache
def _joined() -> bool:
    """Meet the other processes of this run, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return True


def rank() -> int:
    """This process's number; 0 is the first and the only one to write files."""
    return dist.get_rank() if _joined() else 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What this process does of a step."""
    return items[rank() :: dist.get_world_size()] if _joined() else items


def add_up(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes; one that had no record counts as zero."""
    if not _joined():
        return
    held = list(parameters)
    for p in held:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.reshape(-1) for p in held if p.grad is not None])
    dist.all_reduce(flat)
    for p, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
        p.grad = part.view_as(p)


def gathered(value: T) -> list[T]:
    """Every process's value, in order of their numbers."""
    if not _joined():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def told(value: T | None) -> T:
    """The first process's value, in all of them; they wait for it."""
    box: list[Any] = [value]
    if _joined():
        dist.broadcast_object_list(box)
    return box[0]


def parted() -> None:
    """Nothing is exchanged from here on: whatever becomes of the others, this process goes on."""
    _over.set()


@contextmanager
def followers(n: int, refuse: Refuse) -> Iterator[None]:
    """Start n − 1 more of this very command beside this process, which becomes the first; ended with it, however it ends.

    Where one of them fails before they have `parted`, so does this process: `refuse` is told the code and the message of its last error,
    and the exit status is its own, 1 where it said nothing (killed, say), so that a supervisor tries again. Under a launcher that set
    WORLD_SIZE (torchrun, accelerate launch) nothing is started, and what ends is the launcher's business.
    """
    if n < 2 or "WORLD_SIZE" in os.environ:
        yield
        return
    if torch.cuda.is_available() and n > torch.cuda.device_count():
        raise ValueError(f"--processes {n}: this machine has {torch.cuda.device_count()} GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
    parent = {"HSCR_PARENT_PID": str(os.getpid())}  # they end themselves where this process is killed
    _over.clear()
    with ExitStack() as files:
        children = []
        for r in range(1, n):
            said = files.enter_context(tempfile.TemporaryFile())
            child = subprocess.Popen(
                [sys.executable, "-m", "hscr", *sys.argv[1:], "--events", "json"],  # it says nothing but why it fails
                env=os.environ | parent | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=subprocess.DEVNULL,
                stdout=said,
            )
            children.append((child, said))
        watch = threading.Thread(target=_watch, args=(children, refuse), daemon=True)
        watch.start()
        try:
            yield
        except RuntimeError as error:
            if (lost := _lost(children, GRACE_S)) is None:
                raise
            refuse(lost.code, lost.message)
            raise SystemExit(lost.status) from error
        finally:
            _over.set()
            watch.join()
            for child, _ in children:
                child.send_signal(signal.SIGKILL)
                child.wait()


@dataclass(frozen=True)
class _Lost:
    """How a follower failed."""

    code: str
    message: str
    status: int


def _watch(children: Followers, refuse: Refuse) -> None:
    """End this process where one of the others has failed and the exchange with it, which no signal interrupts, does not fail by itself."""
    while not _over.wait(0.2):
        if (lost := _lost(children)) is not None and not _over.wait(2 * GRACE_S):
            refuse(lost.code, lost.message)
            for child, _ in children:
                child.send_signal(signal.SIGKILL)
            os._exit(lost.status)


def _lost(children: Followers, within_s: float = 0.0) -> _Lost | None:
    """The first of them that failed; None where none has, within so long."""
    until = time.monotonic() + within_s
    while True:
        for number, (child, said) in enumerate(children, 1):
            if status := child.poll():
                said.seek(0)
                lines = [line for line in said if line.startswith(b'{"type": "error"') and line.endswith(b"\n")]
                if lines and status > 0:
                    error = json.loads(lines[-1])
                    return _Lost(error["code"], error["message"], status)
                return _Lost("process_lost", f"process {number} of this run ended with status {status}", 1)
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)
