"""What lies ahead of a job that is not over: its place in the queue, when it may start, and how long it may take.

Times come from finished jobs of the same model: the median time a record that each stage took, times this job's records. Where too little
is known there is no number rather than a guess. One Outlook is one look at the database; it answers for all jobs of a page. A `glance` may
know of the finished jobs what was so a second ago.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service import datasets
from service.db import Database
from service.jobs import JobRow
from service.models import Job

STAGES = ("generating", "optimizing", "evaluating", "reporting")
HISTORY, AHEAD_MAX = 20, 500
_KNOWN: dict[tuple[str, ...], dict[str, float]] = {}  # rates by the jobs that they come from
_KNOWN_MAX = 256
GLANCE_S = 1.0
_GLANCED: WeakKeyDictionary[Any, dict[str, tuple[float, dict[str, float]]]] = WeakKeyDictionary()  # by engine, by model
_J = Job.__table__.c
_ENDED = select(_J.id).where(_J.model == bindparam("model"), _J.status == "succeeded")  # made once: run with every look
_ENDED = _ENDED.order_by(_J.id.desc()).limit(HISTORY)


@dataclass(frozen=True)
class Ahead:
    """`position` counts from 1; `starts_in_s` and `remaining_s` are estimates, None where nothing is known."""

    position: int | None = None
    starts_in_s: float | None = None
    remaining_s: float | None = None


class Outlook:
    def __init__(self, session: Session, glance: bool = False) -> None:
        self._session, self._glance = session, glance
        self._rates: dict[str, dict[str, float]] = {}

    def of(self, job: JobRow) -> Ahead:
        if job.status == "running":
            return Ahead(remaining_s=_rounded(self._left(job)))
        if job.status != "queued":
            return Ahead()
        before = [other for other in self._queued if (other.queued_at, other.id) < (job.queued_at, job.id)]
        position = 1 + len(before) if len(self._queued) < AHEAD_MAX else self._position(job)
        wait, own = self._wait(before) if position - 1 == len(before) else None, self._whole(job)
        return Ahead(position, _rounded(wait), _rounded(None if wait is None or own is None else wait + own))

    def _position(self, job: JobRow) -> int:
        earlier = or_(Job.queued_at < job.queued_at, (Job.queued_at == job.queued_at) & (Job.id < job.id))
        return 1 + (self._session.scalar(select(func.count()).where(Job.status == "queued", earlier)) or 0)

    @cached_property
    def _queued(self) -> list[Job]:
        query = select(Job).where(Job.status == "queued").order_by(Job.queued_at, Job.id).limit(AHEAD_MAX)
        return list(self._session.scalars(query))

    @cached_property
    def _running(self) -> list[Job]:
        return list(self._session.scalars(select(Job).where(Job.status == "running").limit(AHEAD_MAX)))

    def _wait(self, before: Sequence[JobRow]) -> float | None:
        """The work ahead, shared by as many devices as work now (at least one)."""
        work = [self._left(job) for job in self._running] + [self._whole(job) for job in before]
        known = [w for w in work if w is not None]
        return sum(known) / max(1, len(self._running)) if len(known) == len(work) else None

    def _whole(self, job: JobRow) -> float | None:
        return self._sum(self._expected(job), STAGES)

    def _left(self, job: JobRow) -> float | None:
        """What is left of the running stage by the run's own word, and the stages after it by history."""
        if job.stage not in STAGES:
            return 0.0 if job.stage == "publishing" else self._whole(job)
        later = self._sum(self._expected(job), STAGES[STAGES.index(job.stage) + 1 :])
        progress = job.progress or {}
        here = progress.get("eta_s") if progress.get("stage") == job.stage else None
        if here is None:  # the run cannot tell yet, or again after it was resumed
            here = self._expected(job).get(job.stage)
        return None if later is None or here is None else here + later

    @staticmethod
    def _sum(expected: dict[str, float], stages: tuple[str, ...]) -> float | None:
        return sum(expected[s] for s in stages) if all(s in expected for s in stages) else None

    def _expected(self, job: JobRow) -> dict[str, float]:
        units, rates = self._units(job), self._history(job.model)
        return {s: units[s] * rates[s] for s in STAGES if s in rates} | {s: 0.0 for s in STAGES if units[s] == 0}

    def _history(self, model: str) -> dict[str, float]:
        """Seconds a unit of each stage, over the model's last jobs that succeeded: what those took never changes, so it is remembered."""
        glanced = _GLANCED.setdefault(self._session.get_bind(), {})
        if self._glance and model in glanced and time.monotonic() < glanced[model][0]:
            return glanced[model][1]
        if model not in self._rates:
            ids = tuple(self._session.scalars(_ENDED, {"model": model}))
            if ids not in _KNOWN:
                if len(_KNOWN) >= _KNOWN_MAX:
                    _KNOWN.clear()
                _KNOWN[ids] = self._measured(ids)
            self._rates[model] = _KNOWN[ids]
            if ids:
                glanced[model] = (time.monotonic() + GLANCE_S, _KNOWN[ids])
        return self._rates[model]

    def _measured(self, ids: tuple[str, ...]) -> dict[str, float]:
        seen: dict[str, list[float]] = defaultdict(list)
        for job in self._session.scalars(select(Job).where(Job.id.in_(ids))):
            units = self._units(job)
            for stage in STAGES:
                if units[stage] and job.stage_seconds:
                    seen[stage].append(job.stage_seconds.get(stage, 0.0) / units[stage])
        return {stage: median(values) for stage, values in seen.items()}

    def _units(self, job: JobRow) -> dict[str, float]:
        """The size of each stage: records to generate for, records times epochs, records to evaluate on."""
        epochs: Any = job.config.get("optimization", {}).get("epochs", 1)
        n, limit = _size(self._session, job.dataset_id), job.config.get("evaluation", {}).get("max_records")
        tested = _size(self._session, job.evaluation_dataset_id) if job.evaluation_dataset_id else 0
        tested = tested if limit is None else min(tested, limit)
        learnt = n if job.kind == "align" else 0
        return {"generating": learnt, "optimizing": learnt * epochs, "evaluating": tested, "reporting": 1}


def _size(session: Session, dataset_id: str) -> int:
    return datasets.facts(session, dataset_id).n_records


def left_s(database: Database) -> float | None:
    """How long the jobs that run now may take yet, the longest of them; None where nobody knows."""
    try:
        with database.read() as session:
            outlook = Outlook(session)
            left = [outlook.of(job).remaining_s for job in session.scalars(select(Job).where(Job.status == "running"))]
    except DBAPIError:
        return None
    return max((s for s in left if s is not None), default=None)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
