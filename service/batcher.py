"""The queue before an engine, and the one thread that owns its device: questions in, futures out. Knows no torch and no web.

Questions join what the engine works on while their tokens fit its budget, in the order they came; the first after an idle time waits a
short window for others. Full means refused at once, with a guess how long the queue takes. Whoever leaves (cancels the future) is dropped,
waiting or running. An exception reaches the futures of its own batch only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from hscr.answers import Answer, Delta, OnDelta
from hscr.gathering import Gathering

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


class Yielded(Exception):
    """The engine left its device to another owner; it may be back in `retry_after_s`."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the engine is away")
        self.retry_after_s = retry_after_s


class Turn(Protocol):
    """Who else owns the engine's device (service/devices.py). `asked` and `step_aside` are called in the batcher's thread."""

    away: bool
    back_in_s: int

    def asked(self) -> bool:
        """Whether the engine shall leave as soon as nothing runs."""
        ...

    def step_aside(self) -> None:
        """Leave, and return when the engine can work again."""
        ...


class Asked(Protocol):
    """What the routes ask: a Batcher before the local engine, or whatever else answers questions (another server, say)."""

    ready: threading.Event
    failure: Exception | None

    @property
    def depth(self) -> int:
        """Questions that wait."""
        ...

    @property
    def full_for_s(self) -> int | None:
        """About how many seconds until a question would be taken; None where one is now. Asked before a request costs anything."""
        ...

    def submit(self, item: Any, on_delta: OnDelta | None = None) -> Future[Answer]:
        """Queue a question. Raises Full, Closed. A cancelled future takes it out again."""
        ...

    def start(self) -> None:
        """Begin to answer, once."""
        ...

    def close(self) -> None:
        """Take nothing more, answer what waits, end."""
        ...


@dataclass(eq=False)
class Entry(Generic[Item, Result]):
    """A question on its way: what the engine gets, and where its result goes."""

    item: Item
    future: Future[Result]
    on_delta: OnDelta | None
    cost: int  # tokens of prompt and answer, about
    since: float = field(default_factory=time.monotonic)
    joined: float | None = None  # when the engine began with it
    context: Context = field(
        default_factory=copy_context
    )  # of whoever asked: what is told of it later belongs to that request

    @property
    def gone(self) -> bool:
        """Nobody waits for it any more."""
        return self.future.cancelled()

    def finish(self, result: Result | Exception) -> None:
        try:
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        except InvalidStateError:  # cancelled meanwhile
            pass

    def tell(self, delta: Delta) -> None:
        """A listener that fails hears no more: the batch goes on."""
        if self.on_delta is None or self.gone:
            return
        try:
            self.on_delta(delta)
        except Exception as error:
            log.warning("a listener failed: %s", type(error).__name__)
            self.on_delta = None


class Engine(Protocol[Item, Result]):
    """What answers. Every method but `cost` is called in the batcher's thread."""

    joins: bool  # whether questions may join while others run

    def cost(self, item: Item) -> int:
        """About how many tokens of cache the item needs, prompt and answer."""
        ...

    def join(self, entries: Sequence[Entry[Item, Result]]) -> None:
        """Begin to answer; entries that cannot be are finished with their exception."""
        ...

    def step(self) -> None:
        """Go on with all; finish the entries that are whole. What it raises, all that run get."""
        ...

    def leave(self, entries: Sequence[Entry[Item, Result]]) -> None:
        """Answer these no further. What it raises, all that run get."""
        ...


class Whole(Generic[Item, Result]):
    """An engine of one function that answers a whole batch at once: a batch is one step, and what is said is told at its end."""

    joins = False

    def __init__(self, work: Callable[[list[Item]], Sequence[Result | Exception]]) -> None:
        self._work = work
        self._entries: list[Entry[Item, Result]] = []

    def cost(self, item: Item) -> int:
        return 1

    def join(self, entries: Sequence[Entry[Item, Result]]) -> None:
        self._entries = list(entries)

    def step(self) -> None:
        entries, self._entries = self._entries, []
        for entry, result in zip(entries, self._work([e.item for e in entries]), strict=True):
            if entry.on_delta is not None and not isinstance(result, Exception):
                whole: Any = result
                entry.tell(Delta(whole.text, whole.token_ids, whole.logprobs))
            entry.finish(result)

    def leave(self, entries: Sequence[Entry[Item, Result]]) -> None:
        pass  # a call cannot be left


class Batcher(Generic[Item, Result]):
    """The queue and its thread."""

    def __init__(
        self,
        engine: Engine[Item, Result],
        *,
        batch_max: int,
        window_s: float,
        queue_max: int,
        tokens_max: int | None = None,
        setup: Callable[[], None] = lambda: None,
        on_batch: Callable[[int], None] = lambda size: None,
        on_first: Callable[[float], None] = lambda seconds: None,
        turn: Turn | None = None,
        on_end: Callable[[Entry[Item, Result]], None] = lambda entry: None,
    ) -> None:
        """At most `batch_max` items and `tokens_max` tokens (Engine.cost) run at once; one that is larger alone runs alone.

        `on_batch` gets how many run whenever some joined, `on_first` the seconds from a question's coming to its first token,
        `on_end` a question that is over, in the context of its request.
        """
        self._turn = turn
        self._engine, self._setup, self._on_batch, self._on_first = engine, setup, on_batch, on_first
        self._on_end = on_end
        self.batch_max, self.window_s, self.queue_max, self.tokens_max = batch_max, window_s, queue_max, tokens_max
        self._waiting: deque[Entry[Item, Result]] = deque()
        self._running: list[Entry[Item, Result]] = []
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._item_s = 0.5  # a running mean of the time an item takes, for Retry-After
        self._marked = 0.0  # when the last item ended, or work began
        self._gathering = Gathering()  # of newcomers
        self._closing = threading.Event()
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def oldest_s(self) -> float:
        """How long the first that waits has waited."""
        waiting = [entry.since for entry in list(self._waiting) if not entry.gone]
        return time.monotonic() - min(waiting) if waiting else 0.0

    @property
    def depth(self) -> int:
        return sum(not entry.gone for entry in list(self._waiting))

    @property
    def full_for_s(self) -> int | None:
        if len(self._waiting) < self.queue_max or (depth := self.depth) < self.queue_max:
            return None
        return max(1, min(60, round((depth + len(self._running)) * self._item_s)))

    def submit(self, item: Item, on_delta: OnDelta | None = None) -> Future[Result]:
        """Queue an item. Raises Full, Closed. `on_delta` is called in the batcher's thread with what is said, as it is said."""
        entry: Entry[Item, Result] = Entry(item, Future(), on_delta, self._engine.cost(item))
        with self._came:
            if self._closing.is_set():
                raise Closed
            if self._turn is not None and self._turn.away:
                raise Yielded(self._turn.back_in_s)
            if (wait_s := self.full_for_s) is not None:
                raise Full(wait_s)
            self._waiting = deque(e for e in self._waiting if not e.gone)  # their images go too
            self._waiting.append(entry)
            self._came.notify()
        return entry.future

    def close(self, timeout_s: float = 30.0) -> None:
        """Take nothing more, work off what waits, end the thread."""
        with self._came:
            self._closing.set()
            self._came.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._came:
            for entry in self._waiting:  # what was queued behind a thread that did not make it
                entry.future.cancel()

    def _loop(self) -> None:
        try:
            self._setup()
        except Exception as error:
            self._unloadable(error)
            return
        self.ready.set()
        while not (self._closing.is_set() and not self._waiting and not self._running):
            self._leave()
            if self._turn is not None and self._turn.asked():  # what runs is answered, nothing new is begun
                if not self._running:
                    try:
                        self._step_aside(self._turn)
                    except Exception as error:  # it cannot be loaded again
                        self._unloadable(error)
                        return
            elif new := self._admitted():
                self._join(new)
            if self._running:
                self._step()

    def _unloadable(self, error: Exception) -> None:
        """What loads a model sees settings and the model's files, nothing of a caller: why it was refused may be said in whole."""
        reason = {"reason": str(error)[:2000]} if isinstance(error, ValueError) else {}
        log.exception("the model could not be loaded", extra=reason)
        self.failure = error

    def _step_aside(self, turn: Turn) -> None:
        with self._came:
            self.ready.clear()
            turn.away = True
            waiting, self._waiting = self._waiting, deque()
        for entry in waiting:
            entry.finish(Yielded(turn.back_in_s))
        turn.step_aside()
        self.ready.set()

    def _admitted(self) -> list[Entry[Item, Result]]:
        """Those in front of the queue that begin now. Waits only where nothing runs."""
        if self._running:
            return self._newcomers() if self._engine.joins else []
        new: list[Entry[Item, Result]] = []
        until = time.monotonic() + 0.2
        with self._came:
            while True:
                taken = self._taken(beside=new)
                if taken and not new:
                    # Where questions may join, those that come a moment later do; the first need not wait for them.
                    until = time.monotonic() + (0.0 if self._engine.joins else self.window_s)
                new += taken
                left = until - time.monotonic()
                if self._waiting or left <= 0 or (self._closing.is_set() and not new):
                    return new
                self._came.wait(left)

    def _newcomers(self) -> list[Entry[Item, Result]]:
        """Those that join what runs now: as many as a quarter of it, or all that came within a few steps.

        All that run stand still while newcomers' prompts are computed, and several prompts cost little more than one.
        """
        with self._came:
            new = self._taken(beside=self._running)
            if self._gathering.holds(len(new), len(self._running)):
                self._waiting.extendleft(reversed(new))
                return []
        return new

    def _taken(self, beside: Sequence[Entry[Item, Result]]) -> list[Entry[Item, Result]]:
        """Take from the front of the queue what fits beside others."""
        new: list[Entry[Item, Result]] = []
        while self._waiting and (self._waiting[0].gone or self._fits([*beside, *new], self._waiting[0])):
            entry = self._waiting.popleft()
            if not entry.gone:
                new.append(entry)
        return new

    def _fits(self, beside: Sequence[Entry[Item, Result]], entry: Entry[Item, Result]) -> bool:
        if not beside:
            return True
        tokens = sum(e.cost for e in beside) + entry.cost
        return len(beside) < self.batch_max and (self.tokens_max is None or tokens <= self.tokens_max)

    def _join(self, new: list[Entry[Item, Result]]) -> None:
        if not self._running:
            self._marked = time.monotonic()
        self._on_batch(len(self._running) + len(new))
        self._running += new
        for entry in new:
            entry.joined = time.monotonic()
        try:
            self._engine.join(new)
        except Exception as error:
            self._fail(error)
            return
        if self._engine.joins:  # the first tokens are said
            for entry in new:
                self._on_first(time.monotonic() - entry.since)
        self._ended()

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            self._fail(error)
            return
        if not self._engine.joins:
            for entry in self._running:
                self._on_first(time.monotonic() - entry.since)
        self._ended()

    def _ended(self) -> None:
        """Forget what is finished, and note how long it took."""
        left = [entry for entry in self._running if not entry.future.done() or entry.gone]
        if done := len(self._running) - len(left):
            now = time.monotonic()
            self._item_s = 0.8 * self._item_s + 0.2 * (now - self._marked) / done
            self._marked = now
        for entry in self._running:
            if entry not in left:
                entry.context.run(self._on_end, entry)
        self._running = left

    def _leave(self) -> None:
        gone = [entry for entry in self._running if entry.gone]
        if gone:
            self._running = [entry for entry in self._running if not entry.gone]
            try:
                self._engine.leave(gone)
            except Exception as error:  # it must not end this thread
                log.exception("the engine failed on a question that left")
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """What ran together fails together; the engine has dropped it."""
        for entry in self._running:
            entry.finish(error)
        self._running = []
