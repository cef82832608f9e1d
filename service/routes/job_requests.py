"""What may be asked of a job: cancel, pause, resume, approve, retry, delete. Asking twice is harmless."""

from __future__ import annotations

from fastapi import APIRouter

from service import job_requests, retention
from service.routes.jobs import JobId, JobView, job_view
from service.state import Service

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel")
def cancel(state: Service, job_id: JobId) -> JobView:
    """A waiting job is cancelled at once, a running one within seconds (its run gets TERM, then KILL). It does not come back."""
    with state.database.write() as session:
        return job_view(session, job_requests.cancel(session, job_id))


@router.post("/{job_id}/pause", status_code=202, summary="Pause")
def pause(state: Service, job_id: JobId) -> JobView:
    """A queued job is paused at once; a running one writes a checkpoint and frees its device. Its deadline goes on."""
    with state.database.write() as session:
        return job_view(session, job_requests.pause(session, job_id))


@router.post("/{job_id}/resume", status_code=202, summary="Resume a paused job")
def resume(state: Service, job_id: JobId) -> JobView:
    """It is queued again and goes on from its checkpoint."""
    with state.database.write() as session:
        return job_view(session, job_requests.resume(session, job_id))


@router.post("/{job_id}/approve", status_code=202, summary="Approve what was generated")
def approve(state: Service, job_id: JobId) -> JobView:
    """For a job with `review: true` that waits after its generation: it is queued again, for the optimisation."""
    with state.database.write() as session:
        return job_view(session, job_requests.approve(session, job_id))


@router.post("/{job_id}/retry", status_code=202, summary="Retry a failed job")
def retry(state: Service, job_id: JobId) -> JobView:
    """It is queued again and goes on from its last checkpoint, while that is kept; a deadline begins anew."""
    with state.database.write() as session:
        return job_view(session, job_requests.retry(session, job_id, state.settings.key_waiting_max))


@router.delete("/{job_id}", status_code=204, summary="Delete an ended job")
def delete(state: Service, job_id: JobId) -> None:
    """Its events, report, checkpoints and whatever else it has on disk. A version that it published stays, and what it was made from."""
    with state.database.write() as session:
        retention.delete_job(session, job_id)
    # Where a dying run still holds the folder, the sweep frees it.
    retention.free(state.database, state.settings.data_dir, job_id)
    retention.collect(state.database, state.settings.data_dir)
