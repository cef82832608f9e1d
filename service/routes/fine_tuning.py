"""/v1/fine_tuning/jobs: align jobs in OpenAI's shapes. Each route says in OpenAI's words what POST /align, /jobs and their requests do.

A file was checked when it came, so no job is ever `validating_files`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Body, Header, Path, Query, Request, Response
from sqlalchemy import Text, cast, select
from sqlalchemy.orm import Session

from service import job_requests, jobs, openai_errors
from service.errors import Problem
from service.models import Job, JobEvent
from service.pages import After, AfterJob
from service.routes.align import start
from service.routes.fine_tuning_request import ID, FineTuningRequest, align_request, in_their_words
from service.routes.fine_tuning_view import (
    CheckpointList,
    EventList,
    FineTuningJob,
    JobList,
    checkpoint_view,
    event_view,
    tuning_view,
)
from service.routes.job_requests import ask
from service.routes.job_view import job_view, job_views
from service.routing import Router
from service.state import Service, Who

router = Router(prefix="/v1/fine_tuning/jobs", tags=["openai"], responses=openai_errors.RESPONSES)
JobId = Annotated[str, Path(max_length=40, pattern=ID, examples=["job_019ab2c4d5e6f708192a3b4c5d6e"])]
Limit = Annotated[int, Query(ge=1, le=100)]
_CURSOR = re.compile(r"^ft(?:event|ckpt)_(job_[0-9a-f]{28})_([0-9]{1,15})$")
_EXAMPLE = {
    "training_file": "ds_019ab2c4d5e6f708192a3b4c5d6e",
    "model": "hscr-demo",
    "suffix": "ward-7",
    "method": {"type": "hscr", "hscr": {"hyperparameters": {"n_epochs": 3}}},
}


@router.post("", summary="Start an align job (OpenAI)")
def create(
    state: Service,
    who: Who,
    response: Response,
    request: Annotated[FineTuningRequest, Body(openapi_examples={"hscr": {"value": _EXAMPLE}})],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FineTuningJob:
    """As POST /align: the job is stored when this answers, and with an Idempotency-Key one request makes one job."""
    wanted = align_request(request, state.settings.model_id)
    try:
        view, replayed = start(state, who, wanted, idempotency_key)
    except Problem as refusal:
        raise in_their_words(refusal, state.settings.model_id) from None
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return tuning_view(view)


@router.get("", summary="Align jobs, newest first (OpenAI)")
def index(state: Service, request: Request, limit: Limit = 20, after: AfterJob = None) -> JobList:
    """`metadata[key]=value` keeps those that carry it, `metadata=null` those that carry none."""
    query = select(Job).where(Job.kind == "align", Job.deleted_at.is_(None)).order_by(Job.id.desc()).limit(limit + 1)
    query = query.where(Job.id < after) if after else query
    for name, value in list(request.query_params.multi_items())[:20]:
        if name == "metadata" and value == "null":
            query = query.where(cast(Job.meta, Text) == "{}")
        elif name.startswith("metadata"):
            query = query.where(Job.meta[_key(name, value)].as_string() == value)
    with state.database.read() as session:
        rows = session.scalars(query).all()
        shown = [tuning_view(view) for view in job_views(session, rows[:limit])]
    return JobList(data=shown, has_more=len(rows) > limit)


@router.get("/{job_id}", summary="One align job (OpenAI)")
def show(state: Service, job_id: JobId) -> FineTuningJob:
    with state.database.read() as session:
        return tuning_view(job_view(session, _get(session, job_id)))


@router.get("/{job_id}/events", summary="What happened, newest first (OpenAI)")
def events(state: Service, job_id: JobId, limit: Limit = 20, after: After = None) -> EventList:
    with state.database.read() as session:
        rows = _newest(session, _get(session, job_id), after, limit + 1)
    return EventList(data=[event_view(row) for row in rows[:limit]], has_more=len(rows) > limit)


@router.get("/{job_id}/checkpoints", summary="Its checkpoints, newest first (OpenAI)")
def checkpoints(state: Service, job_id: JobId, limit: Limit = 10, after: After = None) -> CheckpointList:
    with state.database.read() as session:
        job = _get(session, job_id)
        rows = _newest(session, job, after, limit + 1, "checkpoint")
        data = [checkpoint_view(job, row, _metrics_before(session, row)) for row in rows[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, has_more=len(rows) > limit, first_id=ends[0], last_id=ends[1])


@router.post("/{job_id}/cancel", summary="Cancel (OpenAI)")
def cancel(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    """A waiting job is cancelled at once, a running one within seconds: until then its status is the old one."""
    return tuning_view(ask(state, who, job_id, "job.cancel", _theirs(job_requests.cancel)))


@router.post("/{job_id}/pause", summary="Pause (OpenAI)")
def pause(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    return tuning_view(ask(state, who, job_id, "job.pause", _theirs(job_requests.pause)))


@router.post("/{job_id}/resume", summary="Resume a paused job (OpenAI)")
def resume(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    return tuning_view(ask(state, who, job_id, "job.resume", _theirs(job_requests.resume)))


def _key(name: str, value: str) -> str:
    """The key of `metadata[key]`; quotes and the like are part of a path's grammar in the database. Raises Problem."""
    found = re.fullmatch(r"metadata\[([\w.\- :/@]{1,64})\]", name)
    if found is None or "\0" in value:
        detail = "Write metadata[key]=value, with a key of letters, digits and . - _ : / @, or metadata=null."
        raise Problem("invalid_request", detail, param="metadata")
    return found[1]


def _get(session: Session, job_id: str) -> Job:
    """An align job that is not deleted. Raises Problem."""
    job = jobs.get(session, job_id)
    if job.kind != "align" or job.deleted_at is not None:
        raise Problem("job_not_found", "No fine-tuning job has this id.")
    return job


def _theirs(wish: Any) -> Any:
    """A wish that is carried out on align jobs only."""

    def checked(session: Session, job_id: str) -> Job:
        _get(session, job_id)
        return wish(session, job_id)

    return checked


def _newest(session: Session, job: Job, after: str | None, limit: int, kind: str | None = None) -> list[JobEvent]:
    """Events before the one that `after` names, newest first. Raises Problem."""
    query = select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq.desc()).limit(limit)
    if kind is not None:
        query = query.where(JobEvent.type == kind)
    if after is not None:
        cursor = _CURSOR.match(after)
        if cursor is None or cursor[1] != job.id:
            raise Problem("invalid_request", "after: must be the id of the last row of the page before.", param="after")
        query = query.where(JobEvent.seq < int(cursor[2]))
    return list(session.scalars(query))


def _metrics_before(session: Session, row: JobEvent) -> JobEvent | None:
    """The last metrics that the job told before an event."""
    query = select(JobEvent).where(JobEvent.job_id == row.job_id, JobEvent.type == "metrics", JobEvent.seq < row.seq)
    return session.scalar(query.order_by(JobEvent.seq.desc()).limit(1))
