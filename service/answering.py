"""What answers here, by HSCR_ENGINE: the local engine behind its queue and with its turn on the device, another server, or nothing.

Made with the application, started and ended with its process. Knows no route.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from service import tracing
from service.batcher import Asked, Batcher, Entry
from service.db import Database
from service.devices import Device, EngineTurn
from service.engine import LocalEngine
from service.metrics import Metrics
from service.outlook import left_s
from service.settings import Settings
from service.upstream.engine import Upstream


@dataclass
class Answering:
    engine: LocalEngine | Upstream
    asked: Asked
    turn: EngineTurn | None = None  # whose turn it is on the engine's device

    @property
    def status(self) -> Literal["ok", "loading", "away", "yielded", "failed"]:
        """`yielded`: a job has the device; `away`: the model server does not answer, or does not serve the model."""
        if self.asked.failure is not None:
            return "failed"
        if self.turn is not None and self.turn.away:
            return "yielded"
        if self.asked.ready.is_set():
            return "ok"
        return "away" if isinstance(self.engine, Upstream) else "loading"

    def failure(self, settings: Settings) -> str | None:
        """Why the model could not be loaded, without paths: /readyz is open to whoever reaches it. None where it is not that."""
        error = self.asked.failure
        if error is None:
            return None
        if isinstance(error, ValueError):
            return settings.shown(str(error)[:2000])
        return f"{type(error).__name__}; the log says where"

    def start(self) -> None:
        self.asked.start()

    def close(self) -> None:
        """Answer what waits, and end. Blocks."""
        if self.turn is not None:
            self.turn.stop.set()
        self.asked.close()


def answering(
    settings: Settings, database: Database, metrics: Metrics, engine: LocalEngine | None = None
) -> Answering | None:
    """What the settings name; None where nothing answers. `engine` in the place of the one that they name is for tests."""
    if engine is None and settings.engine == "none":
        return None
    if engine is None and settings.engine == "openai":
        server = Upstream(settings, metrics.first_token.observe)
        metrics.watch_queue(lambda: server.depth, lambda: server.oldest_s)
        metrics.watch_engine(lambda: asdict(server.stats))
        return Answering(server, server)
    local = engine or LocalEngine(settings)
    turn = EngineTurn(Device.of(settings), local.load, local.unload, lambda: left_s(database))
    batcher = Batcher(
        local,
        batch_max=settings.batch_max,
        window_s=settings.batch_window_s,
        queue_max=settings.queue_max,
        tokens_max=settings.batch_tokens_max,
        setup=turn.begin,
        turn=turn,
        on_batch=metrics.batch_size.observe,
        on_first=metrics.first_token.observe,
        on_end=_trace,
    )
    metrics.watch_queue(lambda: batcher.depth, lambda: batcher.oldest_s)
    metrics.watch_engine(lambda: asdict(local.stats))
    return Answering(local, batcher, turn)


def _trace(entry: Entry[Any, Any]) -> None:
    """Spans of how long a question waited and how long the model worked on it, the grounding pass with it."""
    if entry.joined is not None:
        tracing.past("vqa.queue", entry.since, entry.joined)
        tracing.past("vqa.model", entry.joined, time.monotonic(), tokens=entry.cost)
