"""Images are decoded in processes of their own (service/decode_child.py), kept warm: a file that crashes, stalls or swells takes one of
those along, never the API. A process that was lost is replaced by the next order.

They end when their stdin does, so with this process however it dies. (PR_SET_PDEATHSIG would follow the thread that started them.)
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from PIL import Image

from hscr.image_limits import ImageError, ImageLimits, Note
from hscr.image_view import View
from hscr.images import Decoded
from service.settings import Settings

_F_SETPIPE_SZ, _PIPE_BYTES = 1031, 2**20


class DecodersBusy(Exception):
    """No process became free in time, or too many decoded images are still held."""


@dataclass(frozen=True)
class Cleaned:
    """What is told of an image, and the bytes to store in its file's place; None: the file holds nothing but the picture."""

    note: Note
    data: bytes | None


@dataclass(frozen=True)
class DecodeStats:
    """How the pool does: counts since the start, `busy` now."""

    processes: int
    busy: int
    orders: int
    refused: int
    lost: int
    no_room: int


@dataclass
class _Child:
    process: subprocess.Popen[bytes]

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


class Decoders:
    """`processes` at most, each with `memory_bytes` of addresses and `seconds` an order. Thread-safe.

    Decoded images that somebody still holds (questions that wait) have `held_max_bytes` of pixels together; one order may go over it.
    """

    def __init__(self, processes: int, memory_bytes: int, seconds: float, held_max_bytes: int = 2**30) -> None:
        self.memory_bytes, self.seconds, self.held_max_bytes = memory_bytes, seconds, held_max_bytes
        self._held: dict[
            object, int
        ] = {}  # changed by single calls only: images are let go in any thread, at any point of it
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # None: a process that is not started
        self._counts = dict.fromkeys(("orders", "refused", "lost", "no_room"), 0)
        self._count_lock = threading.Lock()
        self.processes = processes
        for _ in range(processes):
            self._free.put(None)

    def stats(self) -> DecodeStats:
        with self._count_lock:
            return DecodeStats(self.processes, self.processes - self._free.qsize(), **self._counts)

    def decode(self, several: Sequence[bytes], limits: ImageLimits, views: Sequence[View]) -> tuple[Decoded, ...]:
        """The images of one question (hscr.images.read_images). Raises ImageError, DecodersBusy."""
        if sum(list(self._held.values())) >= self.held_max_bytes:
            self._count("no_room")
            raise DecodersBusy
        order = {"sizes": [len(data) for data in several], **_common(limits, views)}
        answer, pixels = self._ask(order, several)
        return tuple(
            Decoded(self._hold(Image.frombytes("RGB", tuple(told["size"]), data), len(data)), _note(told))
            for told, data in zip(answer["images"], pixels, strict=True)
        )

    def check(self, path: Path, limits: ImageLimits = ImageLimits(), view: View = View()) -> Note:
        """Whether a file can be decoded; no pixels come back. Raises ImageError, DecodersBusy."""
        order = {"sizes": [], "path": str(path.resolve()), **_common(limits, [view])}
        return _note(self._ask(order, ())[0]["images"][0])

    def clean(self, path: Path, key: bytes, limits: ImageLimits = ImageLimits(), view: View = View()) -> Cleaned:
        """What of a file may be stored (hscr/clean_image.py). Raises ImageError, DecodersBusy."""
        order = {"sizes": [], "path": str(path.resolve()), "key": key.hex(), **_common(limits, [view])}
        answer, content = self._ask(order, ())
        told = answer["images"][0]
        return Cleaned(_note(told), content[0] if "bytes" in told else None)

    def warm(self) -> None:
        """Start one process now, so that the first question does not wait for it."""
        child = self._free.get()
        self._free.put(child or self._start())

    def close(self) -> None:
        """End the processes that are free."""
        with suppress(queue.Empty):
            while True:
                child = self._free.get_nowait()
                if child is not None:
                    child.end()

    def _ask(self, order: dict[str, Any], data: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        try:
            child = self._free.get(timeout=self.seconds)
        except queue.Empty:
            self._count("no_room")
            raise DecodersBusy from None
        self._count("orders")
        try:
            if child is None or child.process.poll() is not None:
                if child is not None:
                    child.end()
                child = None
                child = self._start()
            late = threading.Timer(self.seconds, child.process.kill)
            late.start()
            try:
                answer, pixels = _exchange(child, order, data)
            except (OSError, EOFError, ValueError):
                stalled = not late.is_alive()
                child.end()
                child = None
                self._count("lost")
                what = f"takes more than {self.seconds:g} s" if stalled else "ended the process that did it"
                raise ImageError(f"decoding the image {what}") from None
            finally:
                late.cancel()
        finally:
            self._free.put(child)
        if "refused" in answer:
            self._count("refused")
            raise ImageError(answer["refused"])
        return answer, pixels

    def _hold(self, image: Image.Image, n_bytes: int) -> Image.Image:
        token = object()
        self._held[token] = n_bytes
        weakref.finalize(image, self._held.pop, token, None)
        return image

    def _count(self, what: str) -> None:
        with self._count_lock:
            self._counts[what] += 1

    def _start(self) -> _Child:
        names = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR")  # no key, no database address
        environment = {k: os.environ[k] for k in names if k in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        child = _Child(
            subprocess.Popen(
                [sys.executable, "-m", "service.decode_child", str(self.memory_bytes), str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a traceback may quote a header
                env=environment,
                start_new_session=True,  # Ctrl-C is for the API, which waits for its answers
            )
        )
        if sys.platform == "linux":
            for pipe in child.pipes:
                with suppress(OSError):
                    fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BYTES)
        return child


@cache
def _shared(processes: int, memory_bytes: int, seconds: float, held_max_bytes: int) -> Decoders:
    decoders = Decoders(processes, memory_bytes, seconds, held_max_bytes)
    atexit.register(decoders.close)
    return decoders


def decoders(settings: Settings) -> Decoders:
    """The one pool of this process."""
    s = settings
    return _shared(s.decode_processes, s.decode_memory_max_bytes, s.decode_max_s, s.decoded_max_bytes)


def _common(limits: ImageLimits, views: Sequence[View]) -> dict[str, Any]:
    return {"limits": asdict(limits), "views": [view.to_json() for view in views]}


def _note(told: dict[str, Any]) -> Note:
    return Note(told["format"], told["modality"], tuple(told["flags"]))


def _exchange(child: _Child, order: dict[str, Any], data: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    orders, answers = child.pipes
    orders.write(json.dumps(order).encode() + b"\n")
    for part in data:
        orders.write(part)
    orders.flush()
    line = answers.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    pixels = []
    for told in answer.get("images", ()):
        size = told["size"][0] * told["size"][1] * 3 if "size" in told else told.get("bytes", 0)
        pixels.append(answers.read(size))
        if len(pixels[-1]) != size:
            raise EOFError
    return answer, pixels
