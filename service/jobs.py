"""The life cycle of a job: one table of transitions, and the few functions that move a job along it.

Each function works in the caller's write transaction. Whatever an attempt writes names its fencing token, and a superseded attempt
changes nothing (Superseded). The update of the job's row comes first, so that its lock orders the events: `seq` has no gaps and never
runs backwards.
No torch and no web framework here: the worker uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from service.db import now
from service.errors import Problem
from service.events import RunEvent, water
from service.models import Job, JobEvent, Outbox, new_id

TRANSITIONS: dict[str, frozenset[str]] = {
    "queued": frozenset({"running", "cancelled", "failed"}),
    "running": frozenset({"queued", "succeeded", "failed", "cancelled"}),
    "paused": frozenset(),
    "awaiting_review": frozenset(),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
ENDED = ("succeeded", "failed", "cancelled")


class Superseded(Exception):
    """This attempt's fencing token is no longer the job's: somebody else has the job, or it has ended."""


@dataclass(frozen=True)
class Claim:
    """The right to work on a job for as long as its lease is renewed."""

    job_id: str
    fence: int


@dataclass(frozen=True)
class Pulse:
    """What an attempt learns when it renews its lease."""

    cancel_requested: bool
    deadline_at: datetime | None


def create(
    session: Session,
    *,
    dataset_id: str,
    adapter_name: str,
    model: str,
    config: dict[str, Any],
    evaluation_dataset_id: str | None = None,
    deadline_s: float | None = None,
    meta: dict[str, Any] | None = None,
) -> Job:
    """A queued job, its first event and its bell, in the caller's transaction."""
    job = Job(
        id=new_id("job"),
        status="queued",
        dataset_id=dataset_id,
        evaluation_dataset_id=evaluation_dataset_id,
        adapter_name=adapter_name,
        model=model,
        config=config,
        meta=meta or {},
        deadline_at=now() + timedelta(seconds=deadline_s) if deadline_s else None,
        last_seq=1,
        fence=0,
    )
    session.add(job)
    session.flush()
    add_event(session, job.id, 1, 0, "status", {"status": "queued"})
    session.add(Outbox(job_id=job.id))
    session.flush()
    return job


def claim(session: Session, job_id: str, lease_s: float) -> Claim | None:
    """Take a queued job; None where there is nothing to take (unknown id, somebody has it, it ended): a bell too many."""
    moved = _move(
        session,
        job_id,
        "running",
        fence=Job.fence + 1,
        attempts=Job.attempts + 1,
        lease_until=now() + timedelta(seconds=lease_s),
        started_at=func.coalesce(Job.started_at, now()),
    )
    if moved is None:
        return None
    seq, fence = moved
    add_event(session, job_id, seq, fence, "status", {"status": "running", "attempt": fence})
    return Claim(job_id, fence)


def heartbeat(
    session: Session,
    mine: Claim,
    lease_s: float,
    events: Sequence[RunEvent] = (),
    *,
    stage: str | None = None,
    progress: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Pulse:
    """Renew the lease and store a run's events with it. Raises Superseded."""
    values: dict[str, Any] = {"lease_until": now() + timedelta(seconds=lease_s), "last_seq": Job.last_seq + len(events)}
    values |= {k: v for k, v in (("stage", stage), ("progress", progress), ("metrics", metrics)) if v is not None}
    reached = max((w for e in events if (w := water(e)) is not None), default=None)
    if reached is not None:
        values["high_water"] = case((Job.high_water < reached, reached), else_=Job.high_water)
    row = session.execute(
        update(Job)
        .where(Job.id == mine.job_id, Job.status == "running", Job.fence == mine.fence)
        .values(**values)
        .returning(Job.last_seq, Job.cancel_requested, Job.deadline_at)
    ).one_or_none()
    if row is None:
        raise Superseded(mine.job_id)
    for seq, event in enumerate(events, row.last_seq - len(events) + 1):
        data = event.model_dump(exclude={"type"}, exclude_none=True)
        add_event(session, mine.job_id, seq, mine.fence, event.type, data)
    return Pulse(row.cancel_requested, row.deadline_at)


def succeed(session: Session, mine: Claim, data: dict[str, Any], **values: Any) -> int:
    """End well; returns the terminal event's seq, for the caller to write it with `add_event` once it knows the version."""
    moved = _move(session, mine.job_id, "succeeded", fence_is=mine.fence, **_ending(), **values)
    if moved is None:
        raise Superseded(mine.job_id)
    return moved[0]


def fail(session: Session, mine: Claim, code: str, message: str) -> None:
    """End badly, for a reason that a retry would not change. Raises Superseded."""
    _end(session, mine.job_id, "failed", {"code": code, "message": message}, mine.fence)


def cancelled(session: Session, mine: Claim) -> None:
    """The run is dead and its device free: end the job as cancelled. Raises Superseded."""
    _end(session, mine.job_id, "cancelled", {}, mine.fence)


def hand_back(session: Session, mine: Claim, reason: str) -> None:
    """Queue the job again at once, with its bell: the worker stops. It is no crash. Raises Superseded."""
    _requeue(session, mine.job_id, mine.fence, reason)


def crash(session: Session, job_id: str, fence: int, code: str, message: str, max_crashes: int) -> str:
    """An attempt died. Queue the job again, or fail it after `max_crashes` in a row without progress between them; returns the new status.

    Raises Superseded. A job whose cancellation was asked for ends as cancelled.
    """
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None or job.status != "running" or job.fence != fence:
        raise Superseded(job_id)
    if job.cancel_requested:
        _end(session, job_id, "cancelled", {}, fence)
        return "cancelled"
    crashes = 1 if job.high_water > job.crash_water else job.crashes + 1
    counted = {"crashes": crashes, "crash_water": job.high_water}
    if crashes >= max_crashes:
        text = f"{message}; {crashes} attempts in a row ended so without progress"
        _end(session, job_id, "failed", {"code": code, "message": text}, fence, **counted)
        return "failed"
    _requeue(session, job_id, fence, code, **counted)
    return "queued"


def reap(session: Session, job_id: str, max_crashes: int) -> str | None:
    """Take a job back from an attempt whose lease ran out; None where it has been renewed meanwhile."""
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None or job.status != "running" or job.lease_until is None or job.lease_until > now():
        return None
    return crash(session, job_id, job.fence, "lease_expired", "the worker stopped renewing its lease", max_crashes)


def expire(session: Session, job_id: str) -> None:
    """Fail a job that was still queued at its deadline."""
    moved = _move(session, job_id, "failed", fence_is=None, only_from="queued", **_ending(), **_error(DEADLINE))
    if moved:
        add_event(session, job_id, *moved, "status", {"status": "failed", "error": DEADLINE})


DEADLINE = {"code": "deadline", "message": "the job's deadline passed"}


def request_cancel(session: Session, job_id: str) -> Job:
    """Cancel a queued job at once; ask a running one to stop. Asking twice changes nothing. Raises Problem for an ended one."""
    if moved := _move(session, job_id, "cancelled", only_from="queued", cancel_requested=True, **_ending()):
        add_event(session, job_id, *moved, "status", {"status": "cancelled"})
    else:
        row = session.execute(
            update(Job)
            .where(Job.id == job_id, Job.status == "running", Job.cancel_requested.is_(False))
            .values(cancel_requested=True, last_seq=Job.last_seq + 1)
            .returning(Job.last_seq, Job.fence)
        ).one_or_none()
        if row:
            add_event(session, job_id, row.last_seq, row.fence, "cancel_requested", {})
    job = get(session, job_id)
    if job.status in ("succeeded", "failed"):
        raise Problem("job_ended", f"The job has {job.status}; there is nothing to cancel.")
    return job


def get(session: Session, job_id: str) -> Job:
    """The job as it is now. Raises Problem."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise Problem("job_not_found", "No job has this id; GET /jobs lists them.")
    return job


def events_after(session: Session, job_id: str, seq: int, limit: int) -> list[JobEvent]:
    return list(
        session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > seq).order_by(JobEvent.seq).limit(limit)
        )
    )


def add_event(session: Session, job_id: str, seq: int, fence: int, kind: str, data: dict[str, Any]) -> None:
    session.add(JobEvent(job_id=job_id, seq=seq, fence=fence, type=kind, data=data))


def _move(
    session: Session, job_id: str, to: str, *, fence_is: int | None = None, only_from: str | None = None, **values: Any
) -> tuple[int, int] | None:
    """One transition, allowed by the table, with room for its event: (seq, fence), or None where the job is elsewhere."""
    sources: Iterable[str] = [s for s, targets in TRANSITIONS.items() if to in targets]
    where = [Job.id == job_id, Job.status.in_([s for s in sources if only_from in (None, s)])]
    if fence_is is not None:
        where.append(Job.fence == fence_is)
    row = session.execute(
        update(Job)
        .where(*where)
        .values(status=to, last_seq=Job.last_seq + 1, **values)
        .returning(Job.last_seq, Job.fence)
    ).one_or_none()
    return None if row is None else (row.last_seq, row.fence)


def _end(session: Session, job_id: str, status: str, error: dict[str, str], fence: int, **values: Any) -> None:
    moved = _move(session, job_id, status, fence_is=fence, **_ending(), **_error(error), **values)
    if moved is None:
        raise Superseded(job_id)
    add_event(session, job_id, *moved, "status", {"status": status} | ({"error": error} if error else {}))


def _requeue(session: Session, job_id: str, fence: int, reason: str, **values: Any) -> None:
    # The fence is bumped here already, not only by the next claim: from now on the old attempt can write nothing.
    moved = _move(
        session, job_id, "queued", fence_is=fence, fence=Job.fence + 1, lease_until=None, rung_at=None, **values
    )
    if moved is None:
        raise Superseded(job_id)
    add_event(session, job_id, *moved, "status", {"status": "queued", "reason": reason})
    session.add(Outbox(job_id=job_id))


def _ending() -> dict[str, Any]:
    return {"finished_at": now(), "lease_until": None}


def _error(error: dict[str, str]) -> dict[str, Any]:
    return {"error_code": error["code"], "error_message": error["message"]} if error else {}
