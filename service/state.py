"""What one API process holds, and how a handler gets it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.answering import Answering
from service.artifact_store import ArtifactStore
from service.db import Database
from service.feed import Feed
from service.idempotency import InFlight
from service.keys import Caller
from service.metrics import Metrics
from service.settings import Settings


@dataclass
class State:
    settings: Settings
    database: Database
    metrics: Metrics
    answering: Answering | None
    artifacts: ArtifactStore
    feed: Feed
    asked: Counter[str] = field(default_factory=Counter)  # questions of each key on their way; the event loop's own
    in_flight: InFlight = field(default_factory=InFlight)
    draining: threading.Event = field(default_factory=threading.Event)


# async: FastAPI would take a plain function to a thread and back, for each request.
async def _state(request: Request) -> State:
    return request.app.state.hscr


async def _caller(request: Request) -> Caller:
    return request.state.caller  # put there by service/auth.py


Service = Annotated[State, Depends(_state)]
Who = Annotated[Caller, Depends(_caller)]
