"""What may be asked of a job: cancel, pause, resume, approve, retry, delete. Asking twice is harmless."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.orm import Session

from service import audit, job_requests, retention
from service.keys import Caller
from service.models import Job
from service.routes.job_view import JobView, job_view
from service.routes.jobs import JobId
from service.routing import Router
from service.state import Service, State, Who

router = Router(prefix="/jobs", tags=["jobs"])


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel")
def cancel(state: Service, who: Who, job_id: JobId) -> JobView:
    """A waiting job is cancelled at once, a running one within seconds (its run gets TERM, then KILL). It does not come back."""
    return ask(state, who, job_id, "job.cancel", job_requests.cancel)


@router.post("/{job_id}/pause", status_code=202, summary="Pause")
def pause(state: Service, who: Who, job_id: JobId) -> JobView:
    """A queued job is paused at once; a running one writes a checkpoint and frees its device. Its deadline goes on."""
    return ask(state, who, job_id, "job.pause", job_requests.pause)


@router.post("/{job_id}/resume", status_code=202, summary="Resume a paused job")
def resume(state: Service, who: Who, job_id: JobId) -> JobView:
    """It is queued again and goes on from its checkpoint."""
    return ask(state, who, job_id, "job.resume", job_requests.resume)


@router.post("/{job_id}/approve", status_code=202, summary="Approve what was generated")
def approve(state: Service, who: Who, job_id: JobId) -> JobView:
    """For a job with `review: true` that waits after its generation: it is queued again, for the optimisation."""
    return ask(state, who, job_id, "job.approve", job_requests.approve)


@router.post("/{job_id}/retry", status_code=202, summary="Retry a failed job")
def retry(state: Service, who: Who, job_id: JobId) -> JobView:
    """It is queued again and goes on from its last checkpoint, while that is kept; a deadline begins anew."""
    most = state.settings.key_waiting_max
    return ask(state, who, job_id, "job.retry", lambda session, job: job_requests.retry(session, job, most))


@router.delete("/{job_id}", status_code=204, summary="Delete an ended job")
def delete(state: Service, who: Who, job_id: JobId) -> None:
    """Its events, report, checkpoints and whatever else it has on disk. A version that it published stays, and what it was made from."""
    with state.database.write() as session:
        if retention.delete_job(session, job_id):
            audit.record(session, who.id, "job.delete", job_id)
    # Where a dying run still holds the folder, or the store is away, the sweep frees it.
    retention.free(state.database, state.settings.data_dir, job_id)
    retention.collect_now(state.database, state.settings.data_dir, state.artifacts)


def ask(state: State, who: Caller, job_id: str, action: str, wish: Callable[[Session, str], Job]) -> JobView:
    """Carry out a wish and note it in the audit where it changed something."""
    with state.database.write() as session:
        before = session.get(Job, job_id, with_for_update=True)
        seq = before.last_seq if before else 0
        job = wish(session, job_id)
        if job.last_seq != seq:
            audit.record(session, who.id, action, job_id)
        return job_view(session, job)
