"""One process that decodes images (service/decode_child.py): started, given an order, heard within a time, ended. Knows no pool.

It ends when its stdin does, so with this process however it dies. (PR_SET_PDEATHSIG would follow the thread that started it.)
Files and pixels lie in memory that both share (service/decode_arena.py); where they do not fit there they go through the pipes.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from service.decode_arena import Arena, arena_file

_F_SETPIPE_SZ, _PIPE_BYTES = 1031, 2**20
_HEAD_MAX_BYTES = 2**20  # of an answer's JSON
T = TypeVar("T")


@dataclass
class DecodeProcess:
    """Used by one thread at a time."""

    process: subprocess.Popen[bytes]
    arena: Arena | None

    @classmethod
    def start(cls, memory_bytes: int, seconds: float) -> DecodeProcess:
        names = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR")  # no key, no database address
        environment = {k: os.environ[k] for k in names if k in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        # Pages that an image took serve the next: given back each time, they cost half as much again as decoding a small PNG.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
        shared = arena_file()
        limits = [str(memory_bytes), str(seconds)]
        try:
            made = cls(
                subprocess.Popen(
                    [sys.executable, "-m", "service.decode_child", *limits, *([] if shared is None else [str(shared)])],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # a traceback may quote a header
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the API, which waits for its answers
                    pass_fds=() if shared is None else (shared,),
                ),
                None if shared is None else Arena(shared),
            )
        finally:
            if shared is not None:
                os.close(shared)
        for pipe in made.pipes:
            os.set_blocking(pipe.fileno(), False)  # our ends only
            if sys.platform == "linux":
                with suppress(OSError):
                    fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BYTES)
        return made

    @property
    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.close()

    def answer(
        self,
        order: dict[str, Any],
        data: Sequence[bytes],
        seconds: float,
        taken: Callable[[dict[str, Any], bytearray | memoryview], T],
        meanwhile: Callable[[], object],
    ) -> tuple[dict[str, Any], list[T]]:
        """The answer, and what `taken` makes of what is told of each image and its pixels or bytes, which are there only while it runs.

        `meanwhile` is called when all is sent. Raises TimeoutError after so many seconds, EOFError or OSError where the process ended,
        ValueError where it said something else.
        """
        orders, answers = (pipe.fileno() for pipe in self.pipes)
        until = time.monotonic() + seconds
        shared = self.arena is not None and self.arena.put(data)
        head = json.dumps({**order, "sizes": [len(part) for part in data], "shared": shared}).encode() + b"\n"
        for part in (head,) if shared else (head, *data):
            _through(orders, select.POLLOUT, memoryview(part), until, os.write)
        meanwhile()
        if (length := int.from_bytes(_read(answers, 4, until), "big")) > _HEAD_MAX_BYTES:
            raise ValueError
        answer: dict[str, Any] = json.loads(_read(answers, length, until))
        images = answer.get("images", ())
        sizes = [_size(told) for told in images]
        parts: Iterable[bytearray | memoryview] = (_read(answers, size, until) for size in sizes)
        if self.arena is not None and answer.get("shared"):
            parts = self.arena.get(sizes)
        return answer, [taken(told, part) for told, part in zip(images, parts, strict=True)]


def _size(told: dict[str, Any]) -> int:
    """In bytes, of what comes with it."""
    if "size" in told:
        width, height = told["size"]
        return int(len(told["mode"]) * width * height)
    return int(told.get("bytes", 0))


def _read(descriptor: int, n: int, until: float) -> bytearray:
    out = bytearray(n)
    _through(descriptor, select.POLLIN, memoryview(out), until, lambda fd, left: os.readv(fd, [left]))
    return out


def _through(
    descriptor: int, event: int, left: memoryview, until: float, moved: Callable[[int, memoryview], int]
) -> None:
    """All bytes of `left` through a pipe that does not block, in either direction."""
    ready = select.poll()
    ready.register(descriptor, event)
    while left:
        try:
            n = moved(descriptor, left)
        except BlockingIOError:
            if not ready.poll(max(0.0, 1000 * (until - time.monotonic()))):
                raise TimeoutError from None
            continue
        if n == 0:
            raise EOFError
        left = left[n:]
