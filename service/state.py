"""What one API process holds, and how a handler gets it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.artifact_store import ArtifactStore
from service.batcher import Asked
from service.db import Database
from service.devices import EngineTurn
from service.engine import LocalEngine
from service.feed import Feed
from service.idempotency import InFlight
from service.keys import Caller
from service.metrics import Metrics
from service.settings import Settings
from service.upstream.engine import Upstream


@dataclass
class State:
    settings: Settings
    database: Database
    metrics: Metrics
    engine: LocalEngine | Upstream | None
    batcher: Asked | None
    artifacts: ArtifactStore
    feed: Feed
    asked: Counter[str] = field(default_factory=Counter)  # questions of each key on their way; the event loop's own
    turn: EngineTurn | None = None  # whose turn it is on the engine's device
    in_flight: InFlight = field(default_factory=InFlight)
    draining: threading.Event = field(default_factory=threading.Event)


def _state(request: Request) -> State:
    return request.app.state.hscr


def _caller(request: Request) -> Caller:
    return request.state.caller  # put there by service/auth.py


Service = Annotated[State, Depends(_state)]
Who = Annotated[Caller, Depends(_caller)]
