"""Shards of a running job's generation: rows that idle workers claim like jobs, one compare-and-set each, from the last record backwards.

They are help, not work that must be done: nobody waits for one, and whatever becomes of it the job's run makes what is missing. So a shard
never goes before a job, and whoever makes one stops as soon as it is of no use. Knows no files; those are hscr/parts.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, bindparam, func, select, update
from sqlalchemy.orm import Session

from service import jobs
from service.db import now
from service.models import ApiKey, GenerationShard, Job

MADE, OPEN = "done", "open"
# A job that has waited so long has no free worker: helpers leave. One that is queued only now is for whoever is idle.
PATIENCE_S = 1.0
STAGE = "generating"
# Made once: it is run with every look at a job.
_S = GenerationShard.__table__.c
_COUNTS = select(_S.status, func.count()).where(_S.job_id == bindparam("job_id")).group_by(_S.status)


class Superseded(Exception):
    """The shard is somebody else's by now."""


@dataclass(frozen=True)
class Claim:
    """The right to make part `number` of `parts` of a job's generation, for as long as its lease is renewed."""

    job_id: str
    number: int
    parts: int
    fence: int


def offer(session: Session, job_id: str, parts: int, bounds: Iterable[tuple[int, int, int]]) -> None:
    """Offer shards (number, start, stop), once a job: later attempts find them as they are. In the transaction of a job's heartbeat."""
    if session.scalar(select(func.count()).where(GenerationShard.job_id == job_id)):
        return
    for number, start, stop in bounds:
        session.add(GenerationShard(job_id=job_id, number=number, parts=parts, start=start, stop=stop))
    session.flush()


def wanted(session: Session, running_max: int | None) -> list[str]:
    """The running jobs that have a shard to claim, one entry a shard; none while a job waits that could be claimed instead."""
    running = {j.id: j for j in session.scalars(select(Job).where(Job.status == "running", Job.stage == STAGE))}
    query = select(GenerationShard).where(GenerationShard.job_id.in_(running), GenerationShard.status == OPEN)
    found = [s.job_id for s in session.scalars(query) if _worth_it(s, running[s.job_id])] if running else []
    return [] if not found or jobs_wait(session, running_max) else found


def claim(session: Session, job_id: str, lease_s: float, running_max: int | None) -> Claim | None:
    """Take the last open shard of a job that the job's run is still far from; None where there is none, or a job waits."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None or job.status != "running" or jobs_wait(session, running_max):
        return None
    query = select(GenerationShard).where(GenerationShard.job_id == job_id, GenerationShard.status == OPEN)
    for shard in session.scalars(query.order_by(GenerationShard.number.desc())):
        if not _worth_it(shard, job):
            return None  # those before it are nearer still
        taken = session.execute(
            update(GenerationShard)
            .where(*_is(job_id, shard.number), GenerationShard.status == OPEN)
            .values(status="running", fence=GenerationShard.fence + 1, lease_until=_lease(lease_s))
            .returning(GenerationShard.parts, GenerationShard.fence)
        ).one_or_none()
        if taken is not None:
            return Claim(job_id, shard.number, taken.parts, taken.fence)
    return None


def renew(session: Session, mine: Claim, lease_s: float, running_max: int | None) -> bool:
    """Renew the lease; whether the shard is still of use. Raises Superseded.

    It is not once the job is over, stands still or is asked to, has these records already, or another job has nobody to work on it.
    """
    _write(session, mine, lease_until=_lease(lease_s))
    shard, job = session.get_one(GenerationShard, (mine.job_id, mine.number)), session.get(Job, mine.job_id)
    if job is None or job.status not in ("running", "queued") or _stopping(job):
        return False
    position = _position(job)
    if position is None or position >= shard.stop:
        return False
    return not jobs_wait(session, running_max, since=now() - timedelta(seconds=PATIENCE_S))


def made(session: Session, mine: Claim) -> None:
    """The part is there. Raises Superseded."""
    _write(session, mine, status=MADE, lease_until=None)


def give_back(session: Session, mine: Claim) -> None:
    """Leave it to others. It is no crash. Raises Superseded."""
    _write(session, mine, status=OPEN, lease_until=None)


def crash(session: Session, mine: Claim, max_crashes: int) -> str:
    """Whoever made it died or failed: leave it to others, after `max_crashes` to the job's run; the new status. Raises Superseded."""
    _write(session, mine, crashes=GenerationShard.crashes + 1)
    shard = session.get_one(GenerationShard, (mine.job_id, mine.number), populate_existing=True)
    status = OPEN if shard.crashes < max_crashes else "own"
    _write(session, mine, status=status, lease_until=None)
    return status


def lost(session: Session) -> list[Claim]:
    """Shards whose lease ran out."""
    query = select(GenerationShard).where(GenerationShard.status == "running", GenerationShard.lease_until < now())
    return [Claim(s.job_id, s.number, s.parts, s.fence) for s in session.scalars(query)]


def reap(session: Session, seen: Claim, max_crashes: int) -> str | None:
    """Take a shard back whose lease ran out; None where it has been renewed meanwhile, or has another holder."""
    query = select(GenerationShard.number).where(*_is(seen.job_id, seen.number), GenerationShard.lease_until < now())
    if session.scalar(query.with_for_update()) is None:
        return None
    try:
        return crash(session, seen, max_crashes)
    except Superseded:
        return None


def counts(session: Session, job_id: str) -> Counter[str]:
    """How many of a job's shards are in which status."""
    return Counter({row[0]: row[1] for row in session.execute(_COUNTS, {"job_id": job_id})})


def jobs_wait(session: Session, running_max: int | None, since: datetime | None = None) -> bool:
    """Whether a job waits (since then) that a free worker could claim: its owner has not as many running as allowed."""
    queued = select(Job.owner, ApiKey.running_max).outerjoin(ApiKey, ApiKey.id == Job.owner)
    queued = queued.where(Job.status == "queued").distinct()
    for owner, own_max in session.execute(queued if since is None else queued.where(Job.queued_at <= since)):
        most = running_max if own_max is None else own_max
        if most is None or jobs.count(session, owner, ("running",)) < most:
            return True
    return False


def _worth_it(shard: GenerationShard, job: Job) -> bool:
    """Whether the job's run would come to the shard no sooner than somebody could have made a good part of it."""
    position = _position(job)
    return position is not None and not _stopping(job) and shard.start - position >= (shard.stop - shard.start) / 2


def _position(job: Job) -> int | None:
    """How many records the job's run has, by its last word; None outside the generation."""
    progress = job.progress or {}
    return progress.get("done") if job.stage == STAGE and progress.get("stage") == STAGE else None


def _stopping(job: Job) -> bool:
    return job.cancel_requested or job.pause_requested or (job.deadline_at is not None and job.deadline_at < now())


def _is(job_id: str, number: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return GenerationShard.job_id == job_id, GenerationShard.number == number


def _write(session: Session, mine: Claim, **values: object) -> None:
    held = (GenerationShard.status == "running", GenerationShard.fence == mine.fence)
    row = session.execute(
        update(GenerationShard)
        .where(*_is(mine.job_id, mine.number), *held)
        .values(**values)
        .returning(GenerationShard.number)
    ).one_or_none()
    if row is None:
        raise Superseded(mine.job_id)


def _lease(lease_s: float) -> datetime:
    return now() + timedelta(seconds=lease_s)
