"""What the routes ask where another server answers: the batcher's shape (service/batcher.py, Asked), a bound on questions, and readiness.

One thread with an event loop of its own talks to the server. So many questions are with it at once, so many wait, and more are refused.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass

from hscr.answers import TOKEN_DROPOUT, Answer, OnDelta
from service.batcher import Closed, Full
from service.engine import Question
from service.settings import Settings
from service.upstream.completion import Said, body, messages
from service.upstream.grounding import PERTURBATION, Ground, ground
from service.upstream.loras import Loras
from service.upstream.server import ModelServer, NotServed, garbage, unavailable

log = logging.getLogger("hscr.upstream")


@dataclass
class Stats:
    """Counts since the start; any thread may read them. What else there is to count, the server has."""

    questions: int = 0  # answered
    tokens: int = 0  # said, by the server's own count
    adapters: int = 0  # loaded there


class Upstream:
    """The `openai` engine. `several_images`: the server itself refuses what its model cannot take."""

    several_images = True
    model_digest: str | None = None  # its weights are not ours to read
    failure: Exception | None = None

    def __init__(self, settings: Settings, on_first: Callable[[float], None] = lambda seconds: None) -> None:
        """`on_first` gets the seconds from a question's coming to its first text."""
        self.settings, self._on_first, self.stats = settings, on_first, Stats()
        self.ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="upstream", daemon=True)
        self._started = threading.Event()
        self._lock = threading.Lock()
        self._taken = 0  # questions on their way, waiting or with the server
        self._waiting: dict[object, float] = {}  # since when, in the order they came; changed by single calls only
        self._answer_s = 1.0  # a running mean of the time an answer takes, for Retry-After
        self._closing = False

    def start(self) -> None:
        self._thread.start()
        if not self._started.wait(10):
            raise RuntimeError("the thread that talks to the model server did not start")

    @property
    def depth(self) -> int:
        return max(0, self._taken - self.settings.upstream_concurrency)

    @property
    def oldest_s(self) -> float:
        """How long the first that waits has waited."""
        since = next(iter(list(self._waiting.values())), None)
        return time.monotonic() - since if since is not None else 0.0

    @property
    def full_for_s(self) -> int | None:
        if self._taken < self.settings.upstream_concurrency + self.settings.queue_max:
            return None
        rounds = self.depth / self.settings.upstream_concurrency + 1
        return max(1, min(60, round(rounds * self._answer_s)))

    def submit(self, question: Question, on_delta: OnDelta | None = None) -> Future[Answer]:
        """Raises Full, Closed. Cancelling the future closes its connection, which ends the work there too."""
        with self._lock:
            if self._closing:
                raise Closed
            if (wait_s := self.full_for_s) is not None:
                raise Full(wait_s)
            self._taken += 1
        future = asyncio.run_coroutine_threadsafe(self._answered(question, on_delta), self._loop)
        future.add_done_callback(self._done)
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        with self._lock:
            self._closing = True
        until = time.monotonic() + timeout_s
        while self._taken and time.monotonic() < until:
            time.sleep(0.02)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(5)
        self.ready.clear()  # now that nothing looks any more

    def _done(self, _: Future[Answer]) -> None:
        with self._lock:
            self._taken -= 1

    async def _main(self) -> None:
        """Look after the server until `close`; what is still on its way then is cancelled with the loop."""
        s = self.settings
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._room = asyncio.Semaphore(s.upstream_concurrency)
        async with ModelServer(s) as self._server:
            self._loras = Loras(self._server, s.data_dir, s.upstream_data_dir, s.upstream_adapters_max)
            self._started.set()
            known: str | None = "unknown"
            while not self._stop.is_set():
                wrong = await self._server.look()
                (self.ready.clear if wrong else self.ready.set)()
                if wrong != known:
                    log.info("the model server is ready" if wrong is None else f"the model server: {wrong}")
                known = wrong
                try:
                    await asyncio.wait_for(self._stop.wait(), s.upstream_check_s)
                except TimeoutError:
                    continue

    async def _answered(self, question: Question, on_delta: OnDelta | None) -> Answer:
        came, place = time.monotonic(), object()
        self._waiting[place] = came
        try:
            await self._room.acquire()
        finally:
            del self._waiting[place]
        try:
            begin = time.monotonic()
            for attempt in (1, 2):
                try:
                    answer = await self._ask(question, on_delta, came)
                    self._answer_s = 0.8 * self._answer_s + 0.2 * (time.monotonic() - begin)
                    self.stats.questions += 1
                    self.stats.tokens += answer.completion_tokens
                    return answer
                except NotServed:
                    if question.adapter_digest is None or attempt == 2:
                        break
                    self._loras.forget(question.adapter_digest)  # nothing was said yet: the status came first
            raise unavailable("The model server does not know the model; ask again in a few seconds.")
        finally:
            self._room.release()

    async def _ask(self, question: Question, on_delta: OnDelta | None, came: float) -> Answer:
        server, said = self._server, Said()
        async with self._loras.use(question.adapter_digest, question.adapter_folder) as model:
            self.stats.adapters = self._loras.loaded
            asked = await asyncio.to_thread(messages, question, question.images)
            async with aclosing(server.stream(body(question, asked, model, server.vllm))) as chunks:
                async for chunk in chunks:
                    silent, delta = not said.text, said.add(chunk)
                    if silent and said.text:
                        self._on_first(time.monotonic() - came)
                    if on_delta is not None and (delta.text or delta.token_ids or delta.logprobs):
                        on_delta(delta)
            if said.finish_reason is None:  # the connection ended in the middle
                raise garbage()
            found, begun = Ground(None, None, None), time.monotonic()
            if question.grounding != "none":
                found = await ground(server, question, said, model)
        return Answer(
            text=said.text,
            token_ids=said.token_ids,
            tokens=found.tokens if question.grounding == "tokens" else None,
            score=found.score,
            finish_reason="length" if said.finish_reason == "length" else "stop",
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
            logprobs=said.logprobs if question.logprobs is not None else None,
            perturbation=PERTURBATION if question.grounding != "none" else TOKEN_DROPOUT,
            unavailable=found.unavailable,
            grounded=(begun, time.monotonic()) if found.score is not None else None,
        )
