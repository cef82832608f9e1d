"""The typed events of a run and their JSON lines: what `hscr align` tells whoever started it.

Events hold numbers, digests and fixed words only: no question, answer or file name, for they are stored and shown by the service.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field


class Stopped(Exception):
    """The run was asked to stop and did, after a checkpoint; the same call goes on from there."""


@dataclass(frozen=True)
class Stage:
    """A stage (generating, optimizing, evaluating, reporting) started, completed, or was skipped because its inputs are unchanged."""

    stage: str
    status: str
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units; `rate` in units a second over this process's life, `eta_s` the remaining time."""

    stage: str
    done: int
    total: int
    rate: float
    eta_s: float | None


@dataclass(frozen=True)
class Metrics:
    stage: str
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    stage: str
    step: int
    digest: str


@dataclass(frozen=True)
class Part:
    """Records `first` to `last` (from 1) were made elsewhere and taken up by this run (hscr/parts.py)."""

    stage: str
    first: int
    last: int


@dataclass(frozen=True)
class Warning_:
    code: str
    message: str


@dataclass(frozen=True)
class Result:
    """The run is done: the adapter's folder below the run directory, its manifest's digest, and the headline metrics.

    An evaluation makes no adapter: then `digest` is evaluation.json's; nor does a generation by itself, whose digest is its file's.
    """

    adapter: str | None
    digest: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Error:
    code: str
    message: str


Event = Stage | Progress | Metrics | Checkpoint | Part | Warning_ | Result | Error


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for an event's message; the kind alone where that names a file."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:200] if first and "/" not in first else type(error).__name__


def to_line(event: Event) -> str:
    """One JSON line, `type` first: stage, progress, metrics, checkpoint, part, warning, result or error."""
    kind = type(event).__name__.rstrip("_").lower()
    return json.dumps({"type": kind, **asdict(event)})


class Rate:
    """Progress events of one stage, with rate and remaining time; `already` units were done by an earlier process."""

    def __init__(self, stage: str, total: int, already: int = 0) -> None:
        self.stage, self.total, self.already = stage, total, already
        self._start = time.monotonic()

    def at(self, done: int) -> Progress:
        rate = (done - self.already) / max(time.monotonic() - self._start, 1e-6)
        eta = (self.total - done) / rate if rate > 0 else None
        return Progress(self.stage, done, self.total, round(rate, 3), None if eta is None else round(eta, 1))
