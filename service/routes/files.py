"""/v1/files: data sets in OpenAI's shapes. A file is a data set, read and stored as POST /datasets does; a job's results are its report.

What was sent is not kept: `content` is the data set, as a zip that may be sent again.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from fastapi import File, Form, Path, Query, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import Select, select
from starlette.background import BackgroundTask

from hscr.artifacts import MANIFEST
from service import artifact_store, datasets, jobs, openai_errors, retention
from service.bundle import blocks, zipped
from service.errors import Problem
from service.models import Dataset, Job
from service.pages import after_id
from service.routes.datasets import RejectedView, RepeatsView, take
from service.routes.fine_tuning_request import ID
from service.routes.jobs import report
from service.routing import Router
from service.state import Service, State, Who

router = Router(prefix="/v1/files", tags=["openai"], responses=openai_errors.RESPONSES)
FileId = Annotated[str, Path(max_length=60, pattern=ID, examples=["ds_019ab2c4d5e6f708192a3b4c5d6e"])]
RESULTS = "results_"  # and a job's id: the file of its report
PURPOSE, RESULTS_PURPOSE = "fine-tune", "fine-tune-results"
PAGE_MAX = 500
AfterFile = Annotated[str | None, after_id(f"ds|{RESULTS}job")]


class FileObject(BaseModel):
    """OpenAI's file; what follows `status_details` is ours."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = Field(default=None, description="How many rows were left out, and why the first was.")
    expires_at: int | None = None
    n_records: int | None = None
    rejected: list[RejectedView] = []
    repeats: RepeatsView | None = None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post("", summary="Upload a data set (OpenAI)")
def create(
    state: Service,
    who: Who,
    file: Annotated[
        UploadFile, File(description="A zip of a data set, or JSONL: OpenAI's chat or ours, with images as data URLs.")
    ],
    purpose: Annotated[str, Form(max_length=40)],
    expires: Annotated[str | None, Form(alias="expires_after[anchor]", max_length=40)] = None,
) -> FileObject:
    """Rows that cannot be used are listed in `rejected` and left out; rows that repeat each other are told in `repeats`.

    The same content under the same name is the same file.
    """
    if purpose != PURPOSE:
        raise Problem("invalid_purpose", f"Only files of purpose {PURPOSE} are kept here.", param="purpose")
    if expires is not None:
        raise Problem("invalid_request", "Files are kept until they are deleted.", param="expires_after")
    return _file(take(state, who, file, _name(file.filename or ""))[0], listed=True)


@router.get("", summary="Files (OpenAI)")
def index(
    state: Service,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: AfterFile = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str, Query(max_length=40)] = PURPOSE,
) -> FileList:
    """Data sets; with `purpose=fine-tune-results` the reports of jobs. A page has at most 500."""
    size = min(limit, PAGE_MAX)
    data: list[FileObject] = []
    with state.database.read() as session:
        if purpose == PURPOSE:
            data = [_file(row) for row in session.scalars(_part(select(Dataset), Dataset.id, after, order, size))]
        elif purpose == RESULTS_PURPOSE:
            made = select(Job).where(Job.kind == "align", Job.report.is_not(None))
            last = after.removeprefix(RESULTS) if after else None
            data = [_results(state, job) for job in session.scalars(_part(made, Job.id, last, order, size))]
    shown = data[:size]
    ends = (shown[0].id, shown[-1].id) if shown else (None, None)
    return FileList(data=shown, has_more=len(data) > size, first_id=ends[0], last_id=ends[1])


@router.get("/{file_id}", summary="One file (OpenAI)")
def show(state: Service, file_id: FileId) -> FileObject:
    with state.database.read() as session:
        if not file_id.startswith(RESULTS):
            return _file(datasets.get(session, file_id), listed=True)
        job = jobs.get(session, file_id.removeprefix(RESULTS))
    if job.report is None:
        raise Problem("report_not_found", "A job has its results when it has succeeded.")
    return _results(state, job)


@router.get("/{file_id}/content", summary="A file's content (OpenAI)", response_class=Response)
def content(state: Service, file_id: FileId) -> Response:
    """A data set as a zip (records.jsonl, its images, and preferences.jsonl where it has one); of a job's results report.json."""
    if file_id.startswith(RESULTS):
        return report(state, file_id.removeprefix(RESULTS), accept="application/json")
    with state.database.read() as session:
        stored = datasets.artifact(session, datasets.get(session, file_id).digest)
    with ExitStack() as until_failed:
        root = until_failed.enter_context(state.artifacts.lent(stored))
        sent = until_failed.pop_all()
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST)
    return StreamingResponse(
        zipped((str(path.relative_to(root)), blocks(path)) for path in files),
        media_type="application/zip",
        headers={"Content-Disposition": 'attachment; filename="data-set.zip"'},
        background=BackgroundTask(sent.close),
    )


@router.delete("/{file_id}", summary="Delete a file that no job used (OpenAI)")
def delete(state: Service, who: Who, file_id: FileId) -> FileDeleted:
    if file_id.startswith(RESULTS):
        raise Problem("dataset_in_use", "A job's results go with the job: DELETE /jobs/{id}.")
    with state.database.write() as session:
        datasets.delete(session, file_id, who.id)
    retention.collect_now(state.database, state.settings.data_dir, state.artifacts)
    return FileDeleted(id=file_id)


def _part(query: Select[Any], key: Any, after: str | None, order: str, size: int) -> Select[Any]:
    """A page of a query and one row more."""
    if after is not None:
        query = query.where(key < after if order == "desc" else key > after)
    return query.order_by(key.desc() if order == "desc" else key).limit(size + 1)


def _name(filename: str) -> str:
    """The data set's name: the file's, without its ending and what a name may not hold."""
    stem = PurePosixPath(filename.replace("\\", "/")).stem
    return re.sub(r"[^A-Za-z0-9._\- ]", "-", stem).strip("-. _")[:100] or "file"


def _file(row: Dataset, *, listed: bool = False) -> FileObject:
    first = f"; line {row.rejected[0]['line']}: {row.rejected[0]['reason']}" if row.rejected else ""
    return FileObject(
        id=row.id,
        bytes=row.n_bytes or 0,
        created_at=int(row.created_at.timestamp()),
        filename=f"{row.name}.zip",
        purpose=PURPOSE,
        status_details=f"{row.n_rejected} rows were left out{first}" if row.n_rejected else None,
        n_records=row.n_records,
        rejected=[RejectedView(**r) for r in row.rejected] if listed else [],
        repeats=RepeatsView.model_validate(row.repeats) if listed and row.repeats else None,
    )


def _results(state: State, job: Job) -> FileObject:
    assert job.report is not None
    folder = state.artifacts.at_hand(artifact_store.report(job.report))
    path = folder / "report.json" if folder else None
    return FileObject(
        id=RESULTS + job.id,
        bytes=path.stat().st_size if path and path.is_file() else 0,  # 0 too where only a network knows
        created_at=int((job.finished_at or job.created_at).timestamp()),
        filename="report.json",
        purpose=RESULTS_PURPOSE,
    )
