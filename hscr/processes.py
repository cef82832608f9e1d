"""Several processes that optimise one adapter together: each scores its share of a step's records, gradients are added up (data parallel).

The first process does everything else, writes all files and says what happens; the others follow it. Rendezvous and backend (NCCL, gloo)
are accelerate's. Without other processes every call here does nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# The followers wait while the first process generates and evaluates.
PATIENCE = timedelta(days=30)


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


@contextmanager
def followers(n: int) -> Iterator[None]:
    """Start n − 1 more of this very command beside this process, which becomes the first; ended with it, however it ends.

    Under a launcher that set WORLD_SIZE (torchrun, accelerate launch) nothing is started.
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
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "hscr", *sys.argv[1:]],
            env=os.environ | parent | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for r in range(1, n)
    ]
    try:
        yield
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()
