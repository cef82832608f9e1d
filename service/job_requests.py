"""What a caller may ask of a job: cancel, pause, resume, approve, retry. Each is one compare-and-set along the table of service/jobs.py.

Asking again for what is so already, or under way, changes nothing and is no error: an answer may have been lost. All functions work in the
caller's write transaction, return the job as it then is, and raise Problem where the job is in another status.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from service import jobs
from service.db import lock, now
from service.errors import Problem
from service.jobs import ENDED, WAITING, move
from service.models import ApiKey, Job


def check_room(session: Session, owner: str, waiting_max: int | None) -> None:
    """Refuse one more waiting job than an owner's key, else `waiting_max`, allows. Raises Problem."""
    key = session.get(ApiKey, owner)
    most = waiting_max if key is None or key.waiting_max is None else key.waiting_max
    if most is None:
        return
    lock(session, f"waiting:{owner}")
    if jobs.count(session, owner, WAITING) >= most:
        detail = f"At most {most} jobs of one key wait at a time. Cancel one, or try again when one has started."
        raise Problem("too_many_jobs", detail, headers={"Retry-After": "30"})


def cancel(session: Session, job_id: str) -> Job:
    """A waiting job is cancelled at once; a running one is told to stop."""
    if not move(session, job_id, "cancelled", only_from=WAITING, cancel_requested=True):
        _ask(session, job_id, "cancel_requested")
    job = jobs.get(session, job_id)
    if job.status in ("succeeded", "failed"):
        raise Problem("job_ended", f"The job has {job.status}; there is nothing to cancel.")
    return job


def pause(session: Session, job_id: str) -> Job:
    """A queued job is paused at once; a running one stops after a checkpoint and frees its device."""
    if not move(session, job_id, "paused", only_from=("queued",)):
        _ask(session, job_id, "pause_requested")
    job = jobs.get(session, job_id)
    if job.status not in ("running", "paused"):
        raise _elsewhere(job, "Only a queued or running job can be paused")
    return job


def resume(session: Session, job_id: str) -> Job:
    """A paused job is queued again and goes on from its checkpoint; a pause that a running job has not obeyed yet is taken back."""
    if not move(session, job_id, "queued", only_from=("paused",), say={"reason": "resumed"}):
        _withdraw_pause(session, job_id)
    job = jobs.get(session, job_id)
    if job.status not in ("queued", "running"):
        raise _elsewhere(job, "Only a paused job can be resumed")
    return job


def approve(session: Session, job_id: str) -> Job:
    """What was generated is good: queue the job again, for the optimisation."""
    move(session, job_id, "queued", only_from=("awaiting_review",), say={"reason": "approved"}, approved_at=now())
    job = jobs.get(session, job_id)
    if job.approved_at is None or job.status in ENDED:
        raise _elsewhere(job, "Only a job that awaits review can be approved")
    return job


def retry(session: Session, job_id: str, waiting_max: int | None) -> Job:
    """A failed job is queued again and goes on from its last checkpoint; its deadline and its count of crashes begin anew."""
    job = jobs.get(session, job_id)
    if job.deleted_at is not None:
        raise Problem("job_deleted", "A deleted job cannot be retried; POST /align starts a new one.")
    if job.status == "failed":
        check_room(session, job.owner, waiting_max)
        deadline = now() + timedelta(seconds=job.deadline_s) if job.deadline_s else None
        fresh: dict[str, Any] = {"crashes": 0, "cancel_requested": False, "deadline_at": deadline}
        move(session, job_id, "queued", only_from=("failed",), say={"reason": "retried"}, **fresh)
        job = jobs.get(session, job_id)
    if job.status not in ("queued", "running"):
        raise _elsewhere(job, "Only a failed job can be retried")
    return job


def _ask(session: Session, job_id: str, wish: str) -> None:
    """Note a wish that a running job's supervisor will see with its next heartbeat."""
    column = getattr(Job, wish)
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "running", column.is_(False))
        .values({wish: True, "last_seq": Job.last_seq + 1})
        .returning(Job.last_seq, Job.fence)
    ).one_or_none()
    if row:
        jobs.add_event(session, job_id, row.last_seq, row.fence, wish, {})


def _withdraw_pause(session: Session, job_id: str) -> None:
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "running", Job.pause_requested.is_(True))
        .values(pause_requested=False, last_seq=Job.last_seq + 1)
        .returning(Job.last_seq, Job.fence)
    ).one_or_none()
    if row:
        jobs.add_event(session, job_id, row.last_seq, row.fence, "pause_withdrawn", {})


def _elsewhere(job: Job, rule: str) -> Problem:
    code = "job_ended" if job.status in ENDED else "job_elsewhere"
    return Problem(code, f"{rule}; this one is {job.status.replace('_', ' ')}.")
