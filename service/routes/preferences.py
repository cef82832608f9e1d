"""A job's preference records: look at them, page by page, and download them for other trainers."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from hscr.records import PreferenceRecord, to_json
from service import datasets, jobs, preferences
from service.errors import Problem
from service.models import Dataset
from service.pages import AfterNumber, Page, page
from service.routes.jobs import JobId
from service.state import Service

router = APIRouter(prefix="/jobs", tags=["jobs"])
Form = Literal["trl", "hscr", "ms-swift", "llama-factory"]  # hscr.export.FORMATS, held equal by a test
Limit = Annotated[int, Query(ge=1, le=100, description="Most records of a page.")]


class LevelView(BaseModel):
    text: str
    similarity: float = Field(description="To the right answer.")
    replaced: list[tuple[str, str]] = Field(description="Words of the right answer, and what stands in their place.")
    source: str = Field(description="replacement, sampled or random")


class WordView(BaseModel):
    text: str
    reward: float = Field(description="Nats: how much the image adds to this word.")
    coupled: bool = Field(description="Chosen for replacement.")


class PreferenceView(BaseModel):
    number: int
    record: dict[str, object]
    levels: list[LevelView] = Field(description="Graded wrong answers, nearest to right first.")
    words: list[WordView] = Field(description="The right answer's words; empty where the data set brought its levels.")
    dropped: dict[str, int] = Field(description="Why candidates were left out, counted.")


@router.get("/{job_id}/preferences", summary="The graded wrong answers that the job trains on, in the data set's order")
def index(state: Service, job_id: JobId, limit: Limit = 50, after: AfterNumber = 0) -> Page[PreferenceView]:
    """There from the end of generation on, also while the job still optimises, and of a job that failed or was cancelled later."""
    with state.database.read() as session:
        jobs.get(session, job_id)
    with preferences.opened(state.settings.data_dir, job_id) as file:
        rows = preferences.some(file, after, limit + 1)
    return Page(**page(rows, limit, lambda row: _view(*row), lambda row: row[0]))


@router.get(
    "/{job_id}/preferences/export",
    summary="The same for another trainer, as a zip with the images",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}, "application/jsonl": {}}}},
)
def export(
    state: Service,
    job_id: JobId,
    format: Annotated[Form, Query(description="As `hscr export` writes it; a row a pair, in `hscr` a row a record.")],
    images: Annotated[bool, Query(description="false: the JSON lines alone.")] = True,
) -> StreamingResponse:
    """`preferences.jsonl` and the images that its rows name; the trainer runs in the unpacked folder. Sent while it is made."""
    with state.database.read() as session:
        digest = session.get_one(Dataset, jobs.get(session, job_id).dataset_id).digest
    data = datasets.folder(state.settings.data_dir, digest)
    file = preferences.opened(state.settings.data_dir, job_id)
    if images and not (data / "records.jsonl").is_file():
        file.close()
        raise Problem("artifact_damaged", "The stored data set is missing; restore it, or ask with images=false.")
    body = preferences.as_zip(file, format, data) if images else preferences.as_lines(file, format)
    name = f"{job_id}-{format}.{'zip' if images else 'jsonl'}"
    return StreamingResponse(
        body,
        media_type="application/zip" if images else "application/jsonl",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _view(number: int, preference: PreferenceRecord) -> PreferenceView:
    return PreferenceView(
        number=number,
        record=to_json(preference.record),
        levels=[LevelView.model_validate(level, from_attributes=True) for level in preference.levels],
        words=[WordView.model_validate(word, from_attributes=True) for word in preference.words],
        dropped=preference.dropped,
    )
