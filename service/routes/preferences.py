"""A job's preference records: look at them, page by page, correct them before the optimisation, download them for other trainers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Literal

from fastapi import Path, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.background import BackgroundTask

from hscr.record_fields import MAX_TEXT_CHARS
from hscr.records import PreferenceRecord, to_json
from service import artifact_store, datasets, jobs, preferences, reviews
from service.errors import Problem
from service.models import Dataset, PreferenceEdit
from service.pages import AfterNumber, Page, page
from service.routes.jobs import JobId
from service.routing import Router
from service.state import Service, Who

router = Router(prefix="/jobs", tags=["jobs"])
Form = Literal["trl", "hscr", "ms-swift", "llama-factory"]  # hscr.export.FORMATS, held equal by a test
Limit = Annotated[int, Query(ge=1, le=100, description="Most records of a page.")]


class LevelView(BaseModel):
    text: str
    similarity: float = Field(description="To the right answer.")
    replaced: list[tuple[str, str]] = Field(description="Words of the right answer, and what stands in their place.")
    source: str = Field(description="replacement, sampled or random")
    rejected: bool = Field(False, description="A person took it out.")
    correction: str | None = Field(None, description="What a person put in its place.")


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
    rejected: bool = Field(False, description="A person took the whole record out.")
    reviewed_by: str | None = Field(None, description="Id of the key of the last correction.")


class LevelChange(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    level: int = Field(ge=1, le=1000, description="Its number in the record's `levels`, from 1.")
    rejected: bool = False
    text: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = Field(
        None, description="What stands in its place; null takes a correction back."
    )


class PreferenceChange(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"rejected": True},
                {"levels": [{"level": 1, "text": "The lesion is in the right lobe."}, {"level": 2, "rejected": True}]},
            ]
        },
    )

    rejected: bool | None = None
    levels: Annotated[list[LevelChange], Field(max_length=1000)] = Field(default_factory=list)


@router.get("/{job_id}/preferences", summary="The graded wrong answers that the job trains on, in the data set's order")
def index(state: Service, job_id: JobId, limit: Limit = 50, after: AfterNumber = 0) -> Page[PreferenceView]:
    """There from the end of generation on, also while the job still optimises, and of a job that failed or was cancelled later."""
    with state.database.read() as session:
        jobs.get(session, job_id)
    with preferences.opened(state.settings.data_dir, job_id) as file:
        rows = preferences.some(file, after, limit + 1)
    with state.database.read() as session:
        edits = reviews.of_records(session, job_id, [number for number, _ in rows])
    return Page(**page(rows, limit, lambda row: _view(*row, edits.get(row[0])), lambda row: row[0]))


@router.patch("/{job_id}/preferences/{number}", summary="Reject or correct a record before the optimisation")
def amend(
    state: Service,
    who: Who,
    job_id: JobId,
    number: Annotated[int, Path(ge=1, le=2**31 - 1, description="The record's `number`.")],
    request: PreferenceChange,
) -> PreferenceView:
    """While the job awaits review. The optimisation takes what stands then; the version's lineage says what was changed."""
    changes = {c.level: c.model_dump(include=c.model_fields_set - {"level"}) for c in request.levels}
    if len(changes) < len(request.levels):
        raise Problem("invalid_correction", "A level is named twice; say everything about it once.")
    with state.database.write() as session:
        preference, edit = reviews.amend(
            session, state.settings.data_dir, who.id, job_id, number, rejected=request.rejected, levels=changes
        )
    return _view(number, preference, edit)


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
    """`preferences.jsonl` and the images that its rows name; the trainer runs in the unpacked folder. Sent while it is made.

    Corrections are in it once the job has taken them up after its approval; before that it is what was generated.
    """
    with state.database.read() as session:
        stored = datasets.artifact(session, session.get_one(Dataset, jobs.get(session, job_id).dataset_id).digest)
    with ExitStack() as until_failed:
        file = preferences.opened(state.settings.data_dir, job_id, (preferences.REVIEWED, preferences.FILE))
        until_failed.enter_context(file)
        data = until_failed.enter_context(state.artifacts.lent(stored)) if images else None
        if data is not None and not (data / "records.jsonl").is_file():
            raise artifact_store.damaged(stored.kind)
        sent = until_failed.pop_all()
    body = preferences.as_zip(file, format, data) if data else preferences.as_lines(file, format)
    name = f"{job_id}-{format}.{'zip' if images else 'jsonl'}"
    return StreamingResponse(
        body,
        media_type="application/zip" if images else "application/jsonl",
        background=BackgroundTask(sent.close),
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _view(number: int, preference: PreferenceRecord, edit: PreferenceEdit | None) -> PreferenceView:
    said = edit.levels if edit else {}
    levels = [LevelView.model_validate(level, from_attributes=True) for level in preference.levels]
    for place, level in enumerate(levels, 1):
        change = said.get(str(place), {})
        level.rejected, level.correction = change.get("rejected", False), change.get("text")
    return PreferenceView(
        number=number,
        record=to_json(preference.record),
        levels=levels,
        words=[WordView.model_validate(word, from_attributes=True) for word in preference.words],
        dropped=preference.dropped,
        rejected=edit.rejected if edit else False,
        reviewed_by=edit.actor if edit else None,
    )
