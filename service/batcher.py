"""Micro-batches: a bounded queue in, one thread that works on what came within a short window, futures out. Knows no torch and no web.

Full means refused at once, with a guess how long the queue takes. An item whose future was cancelled (its client left) is dropped
before it is worked on. An exception reaches the futures of its own batch only.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from hscr.answers import Answer, Delta, OnDelta

log = logging.getLogger("hscr.batcher")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Full(Exception):
    """The queue is full; `retry_after_s` is about how long it takes to drain."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The batcher takes nothing more: the process is shutting down."""


class Asked(Protocol):
    """What the routes ask: a Batcher before the local engine, or whatever else answers questions (another server, say)."""

    ready: threading.Event
    failure: Exception | None

    @property
    def depth(self) -> int:
        """Questions that wait."""
        ...

    def submit(self, item: Any, on_delta: OnDelta | None = None) -> Future[Answer]:
        """Queue a question. Raises Full, Closed. A cancelled future takes it out again."""
        ...

    def close(self) -> None:
        """Take nothing more, answer what waits, end."""
        ...


class Batcher(Generic[Item, Result]):
    """`work` gets a batch and returns one result an item; an Exception in a result's place fails that item alone."""

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        batch_max: int,
        window_s: float,
        queue_max: int,
        setup: Callable[[], None] = lambda: None,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work, self._setup, self._on_batch = work, setup, on_batch
        self.batch_max, self.window_s = batch_max, window_s
        self._queue: queue.Queue[tuple[Item, Future[Result], OnDelta | None] | None] = queue.Queue(queue_max)
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._item_s = 0.5  # a running mean of the time an item takes, for Retry-After
        self._closing = threading.Event()
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._queue.qsize()

    def submit(self, item: Item, on_delta: OnDelta | None = None) -> Future[Result]:
        """Queue an item. Raises Full, Closed. `on_delta` is called in the batcher's thread with what is said, as it is said."""
        if self._closing.is_set():
            raise Closed
        future: Future[Result] = Future()
        try:
            self._queue.put_nowait((item, future, on_delta))
        except queue.Full:
            raise Full(max(1, min(60, round(self.depth * self._item_s)))) from None
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Take nothing more, work off what waits, end the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        while True:  # what was queued behind a thread that did not make it
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                entry[1].cancel()

    def _loop(self) -> None:
        try:
            self._setup()
        except Exception as error:
            self.failure = error
            return
        self.ready.set()
        while not (self._closing.is_set() and self._queue.empty()):
            if batch := self._collect():
                self._run(batch)

    def _collect(self) -> list[tuple[Item, Future[Result], OnDelta | None]]:
        """The first item that comes, and whatever follows within the window."""
        batch: list[tuple[Item, Future[Result], OnDelta | None]] = []
        until = time.monotonic() + 0.2
        while len(batch) < self.batch_max:
            try:
                entry = self._queue.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if entry is None or not entry[1].set_running_or_notify_cancel():
                continue
            if not batch:
                until = time.monotonic() + self.window_s
            batch.append(entry)
        return batch

    def _run(self, batch: list[tuple[Item, Future[Result], OnDelta | None]]) -> None:
        begin = time.monotonic()
        self._on_batch(len(batch))
        results: Sequence[Any]
        try:
            results = self._work([item for item, *_ in batch])
        except Exception as error:
            results = [error] * len(batch)
        for (_, future, on_delta), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                if on_delta is not None:
                    tell(on_delta, Delta(result.text, result.token_ids, result.logprobs))
                future.set_result(result)
        self._item_s = 0.8 * self._item_s + 0.2 * (time.monotonic() - begin) / len(batch)


def tell(on_delta: OnDelta, delta: Delta) -> None:
    """A listener that fails hears no more of it: the batch goes on."""
    try:
        on_delta(delta)
    except Exception as error:
        log.warning("a listener failed: %s", type(error).__name__)
