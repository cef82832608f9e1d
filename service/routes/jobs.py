"""Jobs: look, follow (pages or server-sent events), read the report. What changes a job is job_requests.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

from fastapi import Header, Path, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from sqlalchemy import Dialect

from service import artifact_store, jobs
from service.errors import Problem
from service.event_stream import TYPE, event_stream
from service.look import Look, Raw
from service.pages import AfterJob, AfterNumber, Limit, Page, page_text
from service.routes import job_looks
from service.routes.job_view import JobView, Status
from service.routing import Router
from service.state import Service, State
from service.written import kept, written

router = Router(prefix="/jobs", tags=["jobs"])
JobId = Annotated[str, Path(max_length=40, examples=["job_019ab2c4d5e6f708192a3b4c5d6e"])]
HEARTBEAT_S = 15.0


class EventView(BaseModel):
    seq: int
    type: str
    data: dict[str, Any]
    created_at: datetime


@router.get("", summary="Jobs, newest first", response_model=Page[JobView])
@written
def index(
    state: Service, limit: Limit = 50, after: AfterJob = None, status: Annotated[Status | None, Query()] = None
) -> str:
    return page_text(job_looks.page(state.database, after, status, limit + 1), limit)


@router.get("/{job_id}", summary="One job", response_model=JobView)
@written
def show(state: Service, job_id: JobId) -> str:
    return job_looks.one(state.database, job_id)


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


def _event(row: Any) -> EventView:
    return EventView(seq=row.seq, type=row.type, data=row.data, created_at=row.created_at)


def event_json(row: jobs.EventRow) -> dict[str, Any]:
    """An event's public form as the stream writes it."""
    return _event(row).model_dump(mode="json")


def _exists(state: State, job_id: str) -> None:
    with state.database.read() as session:
        jobs.look(session, job_id)


@written
def _page(state: State, job_id: str, after: int, limit: int) -> str:
    """In a thread: the event loop never waits for the database."""
    rows = _EVENTS.rows(state.database, job_id=job_id, seq=after, most=limit + 1)
    if not rows:
        _exists(state, job_id)
    dialect = state.database.engine.dialect
    return page_text([(row[0], _event_text(dialect, row)) for row in rows], limit)


_EVENTS = Look(jobs.EVENTS)


@kept(8 * 2**20)
def _event_text(dialect: Dialect, raw: Raw) -> str:
    """An event as a page shows it, written once for those who look at the same page."""
    return _event(_EVENTS.read(dialect, raw)).model_dump_json()


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
