"""Data sets: upload, list, look at records and images."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import File, Form, Path, Response, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from sqlalchemy import select
from starlette.background import BackgroundTask

from service import datasets, retention
from service.archive import ArchiveLimits
from service.decoding import decoders
from service.errors import Problem
from service.foreign import Reading
from service.keys import Caller
from service.models import Dataset, DatasetRecord
from service.pages import AfterDataset, AfterNumber, Limit, Page, page
from service.routing import Router
from service.state import Service, State, Who
from service.uid_key import uid_key

router = Router(prefix="/datasets", tags=["datasets"])
DatasetId = Annotated[str, Path(max_length=40, examples=["ds_019ab2c4d5e6f708192a3b4c5d6e"])]


class RejectedView(BaseModel):
    file: str | None = Field(None, description="Of a foreign layout: which file of labels.")
    line: int
    reason: str


class DatasetView(BaseModel):
    id: str
    name: str
    version: int
    format: str
    digest: str
    n_records: int
    n_images: int
    n_rejected: int
    created_at: datetime


class PicturesView(BaseModel):
    """Flags say why pixels may show who the patient is: burned_in_annotation, recognizable_features, ultrasound, secondary_capture."""

    formats: dict[str, int]
    flags: dict[str, int] = Field(description="How many files carry each.")
    cleaned: int = Field(description="How many held more than a picture: who, when, where. They were stored without.")


class PlaceView(BaseModel):
    file: str | None = Field(None, description="Of a foreign layout: which file of labels.")
    line: int


class RepeatView(BaseModel):
    questions: int
    records: int
    first: list[list[PlaceView]] = Field(description="Where the records of the first questions stand: 20 each at most.")


class RepeatsView(BaseModel):
    """Records that ask the same of the same pictures. They are kept, and learnt from: take out what is not meant."""

    contradictions: RepeatView = Field(description="With different answers.")
    duplicates: RepeatView = Field(description="With the same answer.")


class DatasetDetail(DatasetView):
    rejected: list[RejectedView]
    pictures: PicturesView | None = None
    repeats: RepeatsView | None = Field(None, description="Absent: uploaded before this was noted.")


class RecordView(BaseModel):
    number: int
    record: dict[str, Any]
    image_url: str


Layout = Literal["auto", "hscr", "vqa-rad", "slake", "pathvqa", "llava", "openai", "trl", "hf-parquet", "table"]


@router.post("", status_code=201, summary="Upload a data set", response_model_exclude_none=True)
def upload(
    state: Service,
    who: Who,
    response: Response,
    file: Annotated[
        UploadFile,
        File(description="A zip of a data set with its images, or one parquet, JSONL or JSON file that holds them."),
    ],
    name: Annotated[str, Form(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\- ]{0,99}$")] = "dataset",
    format: Annotated[
        Layout, Form(description="`hscr`: records.jsonl; the others as `hscr import` reads them.")
    ] = "auto",
    split: Annotated[
        Literal["train", "valid", "test"] | None, Form(description="Of a foreign layout: only it.")
    ] = None,
    languages: Annotated[str, Form(pattern=r"^[A-Za-z-]{1,20}(,[A-Za-z-]{1,20}){0,20}$")] = "en",
) -> DatasetDetail:
    """201 with counts, the rejected rows and the repeated ones.

    The same content under the same name is the same version: 200 with what is there, and what was rejected and repeated in this file.
    """
    reading = Reading(format, split, tuple(languages.split(",")))
    dataset, new = take(state, who, file, name, reading)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return _detail(dataset)


def take(state: State, who: Caller, file: UploadFile, name: str, reading: Reading = Reading()) -> tuple[Dataset, bool]:
    """Import an upload under this replica's limits; the data set and whether it is new. Raises Problem."""
    s = state.settings
    return datasets.import_upload(
        state.database,
        s.data_dir,
        file.file,
        name,
        ArchiveLimits(s.upload_unpacked_max_bytes, s.upload_entries_max),
        s.record_rows_max,
        replace(reading, memory_bytes=s.import_memory_max_bytes, seconds=s.import_max_s),
        who.id,
        decoders(s),
        state.artifacts,
        uid_key(s),
    )


@router.get("", summary="Data sets, newest first")
def index(state: Service, limit: Limit = 50, after: AfterDataset = None) -> Page[DatasetView]:
    query = select(Dataset).order_by(Dataset.id.desc()).limit(limit + 1)
    with state.database.read() as session:
        rows = session.scalars(query.where(Dataset.id < after) if after else query).all()
    return Page(**page(rows, limit, _view, lambda row: row.id))


@router.get("/{dataset_id}", summary="One data set", response_model_exclude_none=True)
def show(state: Service, dataset_id: DatasetId) -> DatasetDetail:
    with state.database.read() as session:
        return _detail(datasets.get(session, dataset_id))


@router.delete("/{dataset_id}", status_code=204, summary="Delete a data set that no job used")
def delete(state: Service, who: Who, dataset_id: DatasetId) -> None:
    """Its rows and, where no other data set has the same content, its files."""
    with state.database.write() as session:
        datasets.delete(session, dataset_id, who.id)
    retention.collect_now(state.database, state.settings.data_dir, state.artifacts)


@router.get("/{dataset_id}/records", summary="Its records, in file order")
def records(state: Service, dataset_id: DatasetId, limit: Limit = 50, after: AfterNumber = 0) -> Page[RecordView]:
    with state.database.read() as session:
        datasets.get(session, dataset_id)
        query = select(DatasetRecord).where(DatasetRecord.dataset_id == dataset_id, DatasetRecord.number > after)
        rows = session.scalars(query.order_by(DatasetRecord.number).limit(limit + 1)).all()
    return Page(**page(rows, limit, _record, lambda row: row.number))


@router.get("/{dataset_id}/records/{number}/image", summary="A record's image", response_class=FileResponse)
def image(state: Service, dataset_id: DatasetId, number: Annotated[int, Path(ge=1, le=2**31 - 1)]) -> FileResponse:
    with state.database.read() as session:
        dataset = datasets.get(session, dataset_id)
        row = session.get(DatasetRecord, (dataset_id, number))
        stored = datasets.artifact(session, dataset.digest)
    if row is None:
        raise Problem("not_found", "The data set has no record of this number.")
    # The path was checked when the record was read: relative and without "..".
    headers = {"Content-Security-Policy": "sandbox", "Cache-Control": "private, max-age=3600"}
    first = row.record.get("image") or row.record["images"][0]
    with ExitStack() as until_failed:
        path = until_failed.enter_context(state.artifacts.lent_file(stored, first))
        sent = until_failed.pop_all()
    return FileResponse(path, headers=headers, background=BackgroundTask(sent.close))


def _view(row: Dataset) -> DatasetView:
    return DatasetView.model_validate(row, from_attributes=True)


def _detail(row: Dataset) -> DatasetDetail:
    return DatasetDetail.model_validate(row, from_attributes=True)


def _record(row: DatasetRecord) -> RecordView:
    return RecordView(
        number=row.number, record=row.record, image_url=f"/datasets/{row.dataset_id}/records/{row.number}/image"
    )
