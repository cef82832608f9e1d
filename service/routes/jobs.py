"""Jobs: look, follow (pages or server-sent events), read the report. What changes a job is job_requests.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal

from fastapi import Header, Path, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from sqlalchemy import Select, bindparam, select
from sqlalchemy.orm import Session

from service import artifact_store, datasets, jobs, shards
from service.errors import Problem
from service.event_stream import TYPE, event_stream
from service.models import AdapterVersion, Job
from service.outlook import Ahead, Outlook
from service.pages import After, AfterNumber, Limit, Page, page
from service.routing import Router
from service.state import Service, State
from service.written import written

router = Router(prefix="/jobs", tags=["jobs"])
JobId = Annotated[str, Path(max_length=40, examples=["job_019ab2c4d5e6f708192a3b4c5d6e"])]
Status = Literal["queued", "running", "paused", "awaiting_review", "succeeded", "failed", "cancelled"]
HEARTBEAT_S = 15.0


class Progress(BaseModel):
    stage: str
    done: int
    total: int
    rate: float | None = None
    eta_s: float | None = None


class JobError(BaseModel):
    code: str
    message: str


class DatasetRef(BaseModel):
    id: str
    digest: str


class VersionRef(BaseModel):
    name: str
    version: int
    digest: str


class Lineage(BaseModel):
    dataset: DatasetRef
    evaluation_dataset: DatasetRef | None
    adapter: VersionRef | None = Field(description="The version that the job made.")
    source: VersionRef | None = Field(None, description="The version that it evaluates, or aligns on top of.")


class QueueView(BaseModel):
    position: Annotated[int | None, Field(description="Place among the queued jobs, from 1; null: not queued.")] = None
    starts_in_s: Annotated[float | None, Field(description="An estimate from finished jobs; null: not known.")] = None


class Sharing(BaseModel):
    shards: int = Field(description="Parts of the generation that idle workers may make.")
    made: int
    working: int = Field(description="Workers that make one now.")


class JobView(BaseModel):
    """Fields with a default came later than the first release: an answer stored for a replay may lack them."""

    id: str
    kind: Literal["align", "evaluate"] = "align"
    status: Status
    stage: str | None
    cancel_requested: bool
    pause_requested: bool = False
    owner: str = Field(jobs.LOCAL, description="Id of the key that asked for it; `env` or `local` without one.")
    review: bool = Field(False, description="Stops after generation until POST /jobs/{id}/approve.")
    approved_at: datetime | None = None
    queue: QueueView = QueueView()
    remaining_s: float | None = Field(
        None, description="Until it ends, waiting included; an estimate. Null: not known."
    )
    adapter: str
    model: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    progress: Progress | None
    sharing: Sharing | None = Field(
        None, description="Help with the generation. Only in GET /jobs/{id}; null: none was offered."
    )
    metrics: dict[str, Any]
    stage_seconds: dict[str, float] = {}
    error: JobError | None
    attempts: int
    lineage: Lineage
    report_url: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None
    deleted_at: datetime | None = None


class EventView(BaseModel):
    seq: int
    type: str
    data: dict[str, Any]
    created_at: datetime


@router.get("", summary="Jobs, newest first")
@written
def index(
    state: Service, limit: Limit = 50, after: After = None, status: Annotated[Status | None, Query()] = None
) -> Page[JobView]:
    asked = {"most": limit + 1, "after": after, "status": status}
    with state.database.read() as session:
        rows = session.execute(_page_of(after is not None, status is not None), asked).all()
        outlook = Outlook(session)
        made = _versions(session, rows)
        return Page[JobView](**page(rows, limit, lambda row: job_view(session, row, outlook, made), lambda row: row.id))


@router.get("/{job_id}", summary="One job")
@written
def show(state: Service, job_id: JobId) -> JobView:
    with state.database.read() as session:
        view, offered = job_view(session, jobs.look(session, job_id)), shards.counts(session, job_id)
        if offered:
            view.sharing = Sharing(shards=offered.total(), made=offered[shards.MADE], working=offered["running"])
        return view


@router.get(
    "/{job_id}/events",
    summary="What happened, as a page or a stream",
    response_model=Page[EventView],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(
    state: Service,
    job_id: JobId,
    limit: Limit = 200,
    after: AfterNumber = 0,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> Any:
    """With `Accept: text/event-stream` a stream that ends with the job; reconnect with Last-Event-ID and nothing is lost."""
    if TYPE in accept:
        await asyncio.to_thread(_exists, state, job_id)
        start = after if last_event_id is None else last_event_id
        return event_stream(_stream(state, job_id, start))
    return await _page(state, job_id, after, limit)


@router.get("/{job_id}/report", summary="The run's report", response_class=Response)
def report(state: Service, job_id: JobId, accept: Annotated[str, Header()] = "") -> Response:
    """The page for people; with `Accept: application/json` its numbers."""
    with state.database.read() as session:
        name = jobs.look(session, job_id).report
    kind = "report.json" if "application/json" in accept and "text/html" not in accept else "report.html"
    if name is None:
        raise Problem("report_not_found", "A job has its report when it has succeeded.")
    path = state.artifacts.fetch(artifact_store.report(name)) / kind
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
    return FileResponse(path, headers={"Content-Security-Policy": policy})


def job_view(
    session: Session,
    job: jobs.JobRow,
    outlook: Outlook | None = None,
    made: Mapping[str, VersionRef] | None = None,
) -> JobView:
    """The public form of a job. Also the body that POST /align stores for replays. `made`: its `_versions`, where they are known."""
    ahead = Ahead() if job.status in jobs.ENDED else (outlook or Outlook(session)).of(job)
    made = _versions(session, [job]) if made is None else made
    return JobView(
        id=job.id,
        kind=job.kind,  # type: ignore[arg-type]
        status=job.status,  # type: ignore[arg-type]  # the table's check constraint is the same list
        stage=job.stage,
        cancel_requested=job.cancel_requested,
        pause_requested=job.pause_requested,
        owner=job.owner,
        review=job.review,
        approved_at=job.approved_at,
        queue=QueueView(position=ahead.position, starts_in_s=ahead.starts_in_s),
        remaining_s=ahead.remaining_s,
        adapter=job.adapter_name,
        model=job.model,
        config=job.config,
        metadata=job.meta,
        progress=Progress(**job.progress) if job.progress else None,
        sharing=None,
        metrics=job.metrics,
        stage_seconds=job.stage_seconds,
        error=JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
        attempts=job.attempts,
        lineage=Lineage(
            dataset=_dataset(session, job.dataset_id),
            evaluation_dataset=_dataset(session, job.evaluation_dataset_id) if job.evaluation_dataset_id else None,
            adapter=made.get(job.id),
            source=VersionRef(name=job.source_name, version=job.source_version, digest=job.source_digest)
            if job.source_name and job.source_version and job.source_digest
            else None,
        ),
        report_url=f"/jobs/{job.id}/report" if job.report else None,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        deadline_at=job.deadline_at,
        deleted_at=job.deleted_at,
    )


# Statements as in service/jobs.py: made once, of tables.
_J, _V = Job.__table__.c, AdapterVersion.__table__.c


@cache
def _page_of(after: bool, status: bool) -> Select[Any]:
    query = select(Job.__table__).where(_J.deleted_at.is_(None)).order_by(_J.id.desc()).limit(bindparam("most"))
    query = query.where(_J.id < bindparam("after")) if after else query
    return query.where(_J.status == bindparam("status")) if status else query


_MADE_BY = select(_V.job_id, _V.adapter_name, _V.version, _V.digest)
_MADE_BY = _MADE_BY.where(_V.job_id.in_(bindparam("ids", expanding=True)))


def _versions(session: Session, rows: Sequence[jobs.JobRow]) -> dict[str, VersionRef]:
    """The versions that these jobs made, by job: a job makes one when it succeeds, not before."""
    ids = [job.id for job in rows if job.status == "succeeded" and job.kind == "align"]
    if not ids:
        return {}
    found = session.execute(_MADE_BY, {"ids": ids})
    return {str(job_id): VersionRef(name=name, version=number, digest=digest) for job_id, name, number, digest in found}


def _dataset(session: Session, dataset_id: str) -> DatasetRef:
    return DatasetRef(id=dataset_id, digest=datasets.facts(session, dataset_id).digest)


def _event(row: jobs.EventRow) -> EventView:
    return EventView(seq=row.seq, type=row.type, data=row.data, created_at=row.created_at)


def event_json(row: jobs.EventRow) -> dict[str, Any]:
    """An event's public form as the stream writes it."""
    return _event(row).model_dump(mode="json")


def _exists(state: State, job_id: str) -> None:
    with state.database.read() as session:
        jobs.look(session, job_id)


@written
def _page(state: State, job_id: str, after: int, limit: int) -> Page[EventView]:
    """In a short session of its own, in a thread: the event loop never waits for the database."""
    with state.database.read() as session:
        jobs.look(session, job_id)
        rows = jobs.events_after(session, job_id, after, limit + 1)
    return Page[EventView](**page(rows, limit, _event, lambda row: row.seq))


async def _stream(state: State, job_id: str, after: int) -> AsyncIterator[str]:
    spoke = time.monotonic()
    yield "retry: 1000\n\n"
    async with aclosing(state.feed.follow(job_id, after)) as texts:
        async for text in texts:
            if state.draining.is_set():
                return  # a caller who left is noticed by the response itself
            if text is not None:
                spoke = time.monotonic()
                yield text
            elif time.monotonic() - spoke > HEARTBEAT_S:
                spoke = time.monotonic()
                yield ": still here\n\n"
