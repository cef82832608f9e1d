"""Images are decoded in processes of their own (service/decode_process.py), kept warm: a file that crashes, stalls or swells takes one of
those along, never the API. A process that was lost is replaced by the next order.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from hscr.image_limits import ImageError, ImageLimits, Note
from hscr.image_view import View
from hscr.images import Decoded
from service.decode_process import DecodeProcess
from service.settings import Settings

T = TypeVar("T")


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


class Decoders:
    """`processes` at most, each with `memory_bytes` of addresses and `seconds` an order. Thread-safe.

    Decoded images that somebody still holds (questions that wait) have `held_max_bytes` of pixels together; one order may go over it.
    Of them `recent_max_bytes` are kept for the next question on the same file, and let go where those that wait need the room.
    """

    def __init__(
        self,
        processes: int,
        memory_bytes: int,
        seconds: float,
        held_max_bytes: int = 2**30,
        recent_max_bytes: int = 0,
    ) -> None:
        self.memory_bytes, self.seconds, self.held_max_bytes = memory_bytes, seconds, held_max_bytes
        self._recent = Recent(recent_max_bytes)
        # Changed by single calls only: images are let go in any thread, at any point of it.
        self._held: dict[object, int] = {}
        self._free: queue.LifoQueue[DecodeProcess | None] = queue.LifoQueue()  # None: a process that is not started
        self._counts = dict.fromkeys(("orders", "refused", "lost", "no_room"), 0)
        self._count_lock = threading.Lock()
        self.processes = processes
        for _ in range(processes):
            self._free.put(None)

    def stats(self) -> DecodeStats:
        with self._count_lock:
            return DecodeStats(self.processes, self.processes - self._free.qsize(), **self._counts)

    def decode(
        self, several: Sequence[bytes], limits: ImageLimits, views: Sequence[View], salt: str = ""
    ) -> tuple[Decoded, ...]:
        """The images of one question (hscr.images.read_images). Raises ImageError, DecodersBusy.

        What was decoded a moment ago for the same salt is not decoded again.
        """
        common = _common(limits, views)
        glance = _glance(several, common, salt)
        digest = cache(lambda: _digest(several, common, salt))
        if (known := self._recent.get(glance, digest)) is not None:
            return known
        if self._holds_too_much() and not (self._recent.clear() and not self._holds_too_much()):
            self._count("no_room")
            raise DecodersBusy
        # What was never seen has its digest made while another process decodes it.
        decoded = tuple(self._ask(common, several, self._image, digest))
        self._recent.put(glance, digest(), decoded)
        return decoded

    def check(self, path: Path, limits: ImageLimits = ImageLimits(), view: View = View()) -> Note:
        """Whether a file can be decoded; no pixels come back. Raises ImageError, DecodersBusy."""
        order = {"path": str(path.resolve()), **_common(limits, [view])}
        return self._ask(order, (), lambda told, _: _note(told))[0]

    def clean(self, path: Path, key: bytes, limits: ImageLimits = ImageLimits(), view: View = View()) -> Cleaned:
        """What of a file may be stored (hscr/clean_image.py). Raises ImageError, DecodersBusy."""
        order = {"path": str(path.resolve()), "key": key.hex(), **_common(limits, [view])}
        return self._ask(order, (), _cleaned)[0]

    def warm(self) -> None:
        """Start one process now, so that the first question does not wait for it."""
        child = self._free.get()
        self._free.put(child or DecodeProcess.start(self.memory_bytes, self.seconds))

    def close(self) -> None:
        """End the processes that are free."""
        with suppress(queue.Empty):
            while True:
                child = self._free.get_nowait()
                if child is not None:
                    child.end()

    def _ask(
        self,
        order: dict[str, Any],
        data: Sequence[bytes],
        taken: Callable[[dict[str, Any], bytearray | memoryview], T],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[T]:
        """What `taken` makes of each image of the answer (DecodeProcess.answer)."""
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
                child = DecodeProcess.start(self.memory_bytes, self.seconds)
            try:
                answer, made = child.answer(order, data, self.seconds, taken, meanwhile)
            except (OSError, EOFError, ValueError) as error:
                child.end()
                child = None
                self._count("lost")
                stalled = isinstance(error, TimeoutError)
                what = f"takes more than {self.seconds:g} s" if stalled else "ended the process that did it"
                raise ImageError(f"decoding the image {what}") from None
            except BaseException:  # half an answer may be left in the pipe, and it is somebody's image
                child.end()
                child = None
                raise
        finally:
            self._free.put(child)
        if "refused" in answer:
            self._count("refused")
            raise ImageError(answer["refused"])
        return made

    def _holds_too_much(self) -> bool:
        return sum(list(self._held.values())) >= self.held_max_bytes

    def _image(self, told: dict[str, Any], pixels: bytearray | memoryview) -> Decoded:
        image, token = Image.frombytes("RGB", tuple(told["size"]), pixels, "raw", told["mode"]), object()
        self._held[token] = _held_bytes(image)
        weakref.finalize(image, self._held.pop, token, None)
        return Decoded(image, _note(told))

    def _count(self, what: str) -> None:
        with self._count_lock:
            self._counts[what] += 1


class Recent:
    """Decoded images of the last questions, by what they were made from: bounded in bytes, least recently used out first. Thread-safe.

    They are looked up at a glance, and are what is sought only where the digest says so too; of those that look alike the last is kept.

    Where for `seconds` nobody asks about any of them all are let go: they are somebody's pictures.
    """

    def __init__(self, max_bytes: int, seconds: float = 300) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._used, self._waits = 0.0, False
        self._items: OrderedDict[int, tuple[bytes, tuple[Decoded, ...]]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def get(self, glance: int, digest: Callable[[], bytes]) -> tuple[Decoded, ...] | None:
        with self._lock:
            found = self._items.get(glance)
        if found is None or found[0] != digest():
            return None
        with self._lock:
            if glance in self._items:
                self._items.move_to_end(glance)
            self._used = time.monotonic()
        return found[1]

    def put(self, glance: int, digest: bytes, decoded: tuple[Decoded, ...]) -> None:
        size = _pixel_bytes(decoded)
        with self._lock:
            if size > self.max_bytes:
                return
            _, alike = self._items.pop(glance, (b"", ()))
            self._n_bytes += size - _pixel_bytes(alike)
            self._items[glance] = digest, decoded
            self._used = time.monotonic()
            if not self._waits:
                self._wait(self.seconds)
            while self._n_bytes > self.max_bytes:
                self._n_bytes -= _pixel_bytes(self._items.popitem(last=False)[1][1])

    def _wait(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._let_go)
        timer.daemon = self._waits = True
        timer.start()

    def _let_go(self) -> None:
        with self._lock:
            if (left := self._used + self.seconds - time.monotonic()) > 0:
                self._wait(left)
                return
            held, self._items, self._n_bytes, self._waits = self._items, OrderedDict(), 0, False
        del held  # outside of the lock: images tell of their end

    def clear(self) -> bool:
        """Let all go; whether there were any."""
        with self._lock:
            held, self._items, self._n_bytes = self._items, OrderedDict(), 0
        return bool(held)


def _pixel_bytes(decoded: tuple[Decoded, ...]) -> int:
    return sum(_held_bytes(d.image) for d in decoded)


def _held_bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # Pillow's RGB


def _glance(several: Sequence[bytes], common: dict[str, Any], salt: str) -> int:
    """Of what the digest below is of, the lengths and a few bytes from all over the files: other than each kept one's means new."""
    return hash((json.dumps([common, salt]), *((len(data), data[:: len(data) // 256 + 1]) for data in several)))


def _digest(several: Sequence[bytes], common: dict[str, Any], salt: str) -> bytes:
    """Of everything that decoding depends on, and of who may share it."""
    whole = hashlib.sha256(json.dumps([len(several), common, salt]).encode())
    for data in several:
        whole.update(hashlib.sha256(data).digest())
    return whole.digest()


@cache
def _shared(processes: int, memory_bytes: int, seconds: float, held_max_bytes: int, recent_max_bytes: int) -> Decoders:
    decoders = Decoders(processes, memory_bytes, seconds, held_max_bytes, recent_max_bytes)
    atexit.register(decoders.close)
    return decoders


def decoders(settings: Settings) -> Decoders:
    """The one pool of this process."""
    s = settings
    return _shared(
        s.decode_processes, s.decode_memory_max_bytes, s.decode_max_s, s.decoded_max_bytes, s.decoded_recent_max_bytes
    )


def _common(limits: ImageLimits, views: Sequence[View]) -> dict[str, Any]:
    return {"limits": vars(limits), "views": [view.to_json() for view in views]}


def _cleaned(told: dict[str, Any], content: bytearray | memoryview) -> Cleaned:
    return Cleaned(_note(told), bytes(content) if "bytes" in told else None)


def _note(told: dict[str, Any]) -> Note:
    return Note(told["format"], told["modality"], tuple(told["flags"]))
