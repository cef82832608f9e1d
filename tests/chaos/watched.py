"""The Celery worker with its write points marked: `celery -A tests.chaos.watched worker` is worker.tasks, and says how far it is.

Each supervisor writes to POINTS/<its process id> the last point that it passed, and rests there for a moment, so that random faults
fall between two writes too. Nothing of what it does is changed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import adapters
from service.artifact_store import LocalStore
from service.events import CheckpointEvent, StageEvent
from worker import publishing, supervise
from worker.tasks import app

__all__ = ["app"]
_FOLDER, _REST_S = Path(os.environ["CHAOS_POINTS"]), float(os.environ.get("CHAOS_REST_S", "0.1"))


def _passed(point: str, *, rest: bool = True) -> None:
    (_FOLDER / str(os.getpid())).write_text(point)
    if rest:
        time.sleep(random.uniform(0, _REST_S))


def _marked(where: Any, name: str, *, before: str | None = None, after: str | None = None) -> None:
    inner: Callable[..., Any] = getattr(where, name)

    def outer(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            _passed(before)
        made = inner(*arguments, **named)
        if after is not None:
            _passed(after)
        return made

    setattr(where, name, outer)


def _read_on(inner: Callable[..., None]) -> Callable[..., None]:
    """While the run works, its own events say how far it is."""

    def take(attempt: Any, events: list[Any]) -> None:
        inner(attempt, events)
        for event in events:
            if isinstance(event, StageEvent) and event.status == "started":
                _passed(event.stage, rest=False)
            elif isinstance(event, CheckpointEvent):
                _passed("checkpoint", rest=False)

    return take


def _to_its_end(inner: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(attempt: Any) -> None:
        try:
            _passed("claimed")
            inner(attempt)
        finally:
            (_FOLDER / str(os.getpid())).unlink(missing_ok=True)

    return run


_marked(supervise.JobFolder, "begin", after="folder made")
_marked(supervise.Run, "__init__", after="run started")
_marked(supervise._Attempt, "_conclude", before="run ended")
_marked(supervise._Attempt, "_publish", before="publishing")
_marked(supervise._Attempt, "_finish", after="committed")
_marked(LocalStore, "put", after="artifact stored")
_marked(publishing, "store_report", after="report stored")
_marked(adapters, "publish", after="row written")
supervise._Attempt._take = _read_on(supervise._Attempt._take)  # type: ignore[method-assign]
supervise._Attempt.run = _to_its_end(supervise._Attempt.run)  # type: ignore[method-assign]
