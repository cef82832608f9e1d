"""The life cycle of a job: one table of transitions, one function that moves a job along it, and what an attempt at a job may write.

Each function works in the caller's write transaction. Whatever an attempt writes names its fencing token, and a superseded attempt
changes nothing (Superseded). The update of the job's row comes first, so that its lock orders the events: `seq` has no gaps and never
runs backwards. What callers ask of a job (cancel, pause …) is service/job_requests.py. No torch and no web framework: the worker uses this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Row, bindparam, case, func, select, update
from sqlalchemy.orm import Session

from service import webhooks
from service.db import lock, now
from service.errors import Problem
from service.events import RunEvent, water
from service.models import ApiKey, Job, JobEvent, Outbox, new_id

TRANSITIONS: dict[str, frozenset[str]] = {
    "queued": frozenset({"running", "paused", "cancelled", "failed"}),
    "running": frozenset({"queued", "paused", "awaiting_review", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled", "failed"}),
    "awaiting_review": frozenset({"queued", "cancelled", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset(),
}
ENDED = ("succeeded", "failed", "cancelled")
WAITING = ("queued", "paused", "awaiting_review")  # neither running nor over
LOCAL = "local"  # the owner of jobs that were asked for without a key
DEADLINE = {"code": "deadline", "message": "the job's deadline passed"}


EventRow: TypeAlias = "Row[int, int, str, dict[str, Any], datetime]"  # seq, fence, type, data, created_at
JobRow = Job | Row[Any]  # the latter with a column a field, for who only reads

# Run with every look at a job, so made once (to build a statement costs as much as to run it), and of tables rather than classes: plain
# rows, whose fields have the same names, cost half of objects to change.
_JOBS, _E = Job.__table__, JobEvent.__table__.c
_JOB = select(_JOBS).where(_JOBS.c.id == bindparam("job_id"))
EVENTS = select(_E.seq, _E.fence, _E.type, _E.data, _E.created_at)
EVENTS = EVENTS.where(_E.job_id == bindparam("job_id"), _E.seq > bindparam("seq"))
EVENTS = EVENTS.order_by(_E.seq).limit(bindparam("most"))


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
    pause_requested: bool
    deadline_at: datetime | None


class Moved(NamedTuple):
    """Where the event of a transition stands."""

    seq: int
    fence: int


def create(
    session: Session,
    *,
    dataset_id: str,
    adapter_name: str,
    model: str,
    config: dict[str, Any],
    evaluation_dataset_id: str | None = None,
    deadline_s: float | None = None,
    review: bool = False,
    owner: str = LOCAL,
    webhook: str | None = None,
    meta: dict[str, Any] | None = None,
    promote: dict[str, Any] | None = None,
    kind: str = "align",
    source: tuple[str, int, str] | None = None,
) -> Job:
    """A queued job, its first event and its bell, in the caller's transaction. `source`: the version (name, number, digest) it is about."""
    name, version, digest = source or (None, None, None)
    job = Job(
        id=new_id("job"),
        kind=kind,
        source_name=name,
        source_version=version,
        source_digest=digest,
        status="queued",
        dataset_id=dataset_id,
        evaluation_dataset_id=evaluation_dataset_id,
        adapter_name=adapter_name,
        model=model,
        config=config,
        meta=meta or {},
        deadline_s=deadline_s,
        deadline_at=now() + timedelta(seconds=deadline_s) if deadline_s else None,
        review=review,
        owner=owner,
        webhook=webhook,
        promote=promote,
        queued_at=now(),
        last_seq=1,
        fence=0,
    )
    session.add(job)
    session.flush()
    add_event(session, job.id, 1, 0, "status", {"status": "queued"})
    session.add(Outbox(job_id=job.id))
    session.flush()
    return job


def move(
    session: Session,
    job_id: str,
    to: str,
    *,
    only_from: Sequence[str] | None = None,
    held_by: int | None = None,
    say: dict[str, Any] | None = None,
    silent: bool = False,
    **values: Any,
) -> Moved | None:
    """One transition that the table allows, as one compare-and-set, with its event, bell and webhook; None where the job is elsewhere.

    `held_by` is an attempt's fence: the job must be running under it. `say` stands beside the status in the event; `silent` leaves
    the event to the caller.
    """
    allowed = [s for s, targets in TRANSITIONS.items() if to in targets and (only_from is None or s in only_from)]
    where = [Job.id == job_id, Job.status.in_(allowed), Job.deleted_at.is_(None)]
    if held_by is not None:
        where += [Job.status == "running", Job.fence == held_by]
    row = session.execute(
        update(Job)
        .where(*where)
        .values(status=to, last_seq=Job.last_seq + 1, **(_entering(to) | values))
        .returning(Job.last_seq, Job.fence, Job.webhook)
    ).one_or_none()
    if row is None:
        return None
    if row.webhook is not None and to in webhooks.TOLD:
        webhooks.enqueue(session, job_id, row.last_seq, row.webhook, to)
    if not silent:
        add_event(session, job_id, row.last_seq, row.fence, "status", {"status": to} | (say or {}))
    if to == "queued":
        session.add(Outbox(job_id=job_id))
    return Moved(row.last_seq, row.fence)


def _entering(status: str) -> dict[str, Any]:
    """What goes with a status, whichever way a job comes to it."""
    if status == "running":
        return {
            "fence": Job.fence + 1,
            "attempts": Job.attempts + 1,
            "started_at": func.coalesce(Job.started_at, now()),
        }
    left: dict[str, Any] = {"lease_until": None, "pause_requested": False}
    if status in ENDED:
        return left | {"finished_at": now()}
    # The fence is bumped here already, not only by the next claim: from now on the old attempt can write nothing.
    left |= {"fence": Job.fence + 1, "finished_at": None, "error_code": None, "error_message": None}
    left |= {"files_removed_at": None}
    return left | ({"queued_at": now(), "rung_at": None} if status == "queued" else {})


def waits(session: Session, job_id: str) -> bool:
    """Whether the job is there to be claimed, as far as its status goes."""
    return session.scalar(select(Job.id).where(Job.id == job_id, Job.status == "queued")) is not None


def claim(session: Session, job_id: str, lease_s: float, running_max: int | None = None) -> Claim | None:
    """Take a queued job; None where there is nothing to take (unknown id, somebody has it, it ended): a bell too many.

    None too where the job's owner has as many running jobs as its key, else `running_max`, allows; the sweep rings again.
    """
    asked = select(Job.owner, ApiKey.running_max).outerjoin(ApiKey, ApiKey.id == Job.owner)
    by = session.execute(asked.where(Job.id == job_id, Job.status == "queued")).one_or_none()
    if by is None:
        return None
    most = running_max if by.running_max is None else by.running_max
    if most is not None:
        lock(session, f"running:{by.owner}")  # two claims at once must not both see the last free place
        if count(session, by.owner, ("running",)) >= most:
            return None
    moved = move(session, job_id, "running", silent=True, lease_until=_lease(lease_s))
    if moved is None:
        return None
    add_event(session, job_id, *moved, "status", {"status": "running", "attempt": moved.fence})
    return Claim(job_id, moved.fence)


def heartbeat(
    session: Session,
    mine: Claim,
    lease_s: float,
    events: Sequence[RunEvent] = (),
    *,
    stage: str | None = None,
    progress: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    stage_seconds: dict[str, float] | None = None,
) -> Pulse:
    """Renew the lease and store a run's events with it. Raises Superseded."""
    values: dict[str, Any] = {"lease_until": _lease(lease_s), "last_seq": Job.last_seq + len(events)}
    shown = {"stage": stage, "progress": progress, "metrics": metrics, "stage_seconds": stage_seconds}
    values |= {k: v for k, v in shown.items() if v is not None}
    reached = max((w for e in events if (w := water(e)) is not None), default=None)
    if reached is not None:
        values["high_water"] = case((Job.high_water < reached, reached), else_=Job.high_water)
    row = session.execute(
        update(Job)
        .where(Job.id == mine.job_id, Job.status == "running", Job.fence == mine.fence)
        .values(**values)
        .returning(Job.last_seq, Job.cancel_requested, Job.pause_requested, Job.deadline_at)
    ).one_or_none()
    if row is None:
        raise Superseded(mine.job_id)
    for seq, event in enumerate(events, row.last_seq - len(events) + 1):
        data = event.model_dump(exclude={"type"}, exclude_none=True)
        add_event(session, mine.job_id, seq, mine.fence, event.type, data)
    return Pulse(row.cancel_requested, row.pause_requested, row.deadline_at)


def succeed(session: Session, mine: Claim, **values: Any) -> int:
    """End well; returns the last event's seq, for the caller to write it once it knows the version. Raises Superseded."""
    moved = move(session, mine.job_id, "succeeded", held_by=mine.fence, silent=True, **values)
    if moved is None:
        raise Superseded(mine.job_id)
    return moved.seq


def fail(session: Session, mine: Claim, code: str, message: str, **values: Any) -> None:
    """End badly, for a reason that another attempt would not change. Raises Superseded."""
    error = {"code": code, "message": message}
    _let_go(session, mine, "failed", say={"error": error}, error_code=code, error_message=message, **values)


def cancelled(session: Session, mine: Claim) -> None:
    """The run is dead and its device free: end the job as cancelled. Raises Superseded."""
    _let_go(session, mine, "cancelled")


def await_review(session: Session, mine: Claim) -> None:
    """Everything is generated and the caller wants to look before the optimisation: wait for POST /jobs/{id}/approve. Raises Superseded."""
    _let_go(session, mine, "cancelled" if _held(session, mine).cancel_requested else "awaiting_review")


def hand_back(session: Session, mine: Claim, reason: str) -> str:
    """The attempt is over and the job is not; returns the new status. It is no crash. Raises Superseded.

    The job is cancelled or paused where that was asked for, even if the attempt stopped for another reason; else it is queued at once.
    """
    return _back(session, mine, _held(session, mine), reason)


def crash(session: Session, job_id: str, fence: int, code: str, message: str, max_crashes: int) -> str:
    """An attempt died: as `hand_back`, but fail the job after `max_crashes` in a row without progress between them. Raises Superseded."""
    mine = Claim(job_id, fence)
    job = _held(session, mine)
    crashes = 1 if job.high_water > job.crash_water else job.crashes + 1
    counted = {"crashes": crashes, "crash_water": job.high_water}
    if crashes >= max_crashes and not job.cancel_requested:
        fail(session, mine, code, f"{message}; {crashes} attempts in a row ended so without progress", **counted)
        return "failed"
    return _back(session, mine, job, code, **counted)


def reap(session: Session, job_id: str, max_crashes: int) -> str | None:
    """Take a job back from an attempt whose lease ran out; None where it has been renewed meanwhile."""
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None or job.status != "running" or job.lease_until is None or job.lease_until > now():
        return None
    return crash(session, job_id, job.fence, "lease_expired", "the worker stopped renewing its lease", max_crashes)


def expire(session: Session, job_id: str) -> None:
    """Fail a job that was still waiting at its deadline."""
    code, message = DEADLINE["code"], DEADLINE["message"]
    say = {"error": DEADLINE}
    move(session, job_id, "failed", only_from=WAITING, say=say, error_code=code, error_message=message)


def get(session: Session, job_id: str) -> Job:
    """The job as it is now. Raises Problem."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise not_found()
    return job


def look(session: Session, job_id: str) -> JobRow:
    """The job's columns as they are now, for who only reads. Raises Problem."""
    row = session.execute(_JOB, {"job_id": job_id}).one_or_none()
    if row is None:
        raise not_found()
    return row


def not_found() -> Problem:
    return Problem("job_not_found", "No job has this id; GET /jobs lists them.")


def count(session: Session, owner: str, statuses: Sequence[str]) -> int:
    """How many of an owner's jobs are in these statuses."""
    return session.scalar(select(func.count()).where(Job.owner == owner, Job.status.in_(statuses))) or 0


def statuses(session: Session, job_ids: Sequence[str]) -> dict[str, str]:
    return {row.id: row.status for row in session.execute(select(Job.id, Job.status).where(Job.id.in_(job_ids)))}


def events_after(session: Session, job_id: str, seq: int, limit: int) -> Sequence[EventRow]:
    return session.execute(EVENTS, {"job_id": job_id, "seq": seq, "most": limit}).all()


def add_event(session: Session, job_id: str, seq: int, fence: int, kind: str, data: dict[str, Any]) -> None:
    session.add(JobEvent(job_id=job_id, seq=seq, fence=fence, type=kind, data=data))


def _held(session: Session, mine: Claim) -> Job:
    """The job's row, locked, where this attempt still has it. Raises Superseded."""
    job = session.get(Job, mine.job_id, with_for_update=True, populate_existing=True)
    if job is None or job.status != "running" or job.fence != mine.fence:
        raise Superseded(mine.job_id)
    return job


def _back(session: Session, mine: Claim, job: Job, reason: str, **values: Any) -> str:
    to = "cancelled" if job.cancel_requested else "paused" if job.pause_requested else "queued"
    _let_go(session, mine, to, say={"reason": reason} if to == "queued" else None, **values)
    return to


def _let_go(session: Session, mine: Claim, to: str, say: dict[str, Any] | None = None, **values: Any) -> None:
    if move(session, mine.job_id, to, held_by=mine.fence, say=say, **values) is None:
        raise Superseded(mine.job_id)


def _lease(lease_s: float) -> datetime:
    return now() + timedelta(seconds=lease_s)
