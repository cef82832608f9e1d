"""A job's metrics as series: one column a metric over the steps of a stage, for plotting."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import func, select

from service import jobs
from service.events import StageName
from service.models import JobEvent
from service.pages import AfterNumber
from service.routes.jobs import JobId
from service.routing import Router
from service.state import Service

router = Router(prefix="/jobs", tags=["jobs"])
Name = Annotated[str, StringConstraints(max_length=80)]


class SeriesView(BaseModel):
    stage: str
    steps: list[int]
    series: dict[str, list[float | None]] = Field(description="One value a step; null where a step has no such metric.")
    has_more: bool
    next: str | None = Field(description="Pass as `after` to go on; null at the end.")


@router.get("/{job_id}/metrics", summary="Metrics as series")
def metrics(
    state: Service,
    job_id: JobId,
    stage: StageName = "optimizing",
    name: Annotated[list[Name] | None, Query(max_length=50, description="Only these metrics. Repeatable.")] = None,
    limit: Annotated[int, Query(ge=1, le=5000, description="Most steps of a page.")] = 1000,
    after: AfterNumber = 0,
) -> SeriesView:
    """In the order of steps. A step that was taken again after a checkpoint has its last values."""
    step = JobEvent.data["step"].as_integer()
    of_stage = (JobEvent.job_id == job_id, JobEvent.type == "metrics", JobEvent.data["stage"].as_string() == stage)
    # `after` is the last step of the page before plus one, so that 0 begins with step 0.
    newest = select(func.max(JobEvent.seq)).where(*of_stage, step >= after).group_by(step)
    query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.seq.in_(newest)).order_by(step)
    with state.database.read() as session:
        jobs.get(session, job_id)
        rows = session.scalars(query.limit(limit + 1)).all()
    shown = rows[:limit]
    names = dict.fromkeys(n for row in shown for n in row["values"] if name is None or n in name)
    return SeriesView(
        stage=stage,
        steps=[row["step"] for row in shown],
        series={n: [row["values"].get(n) for row in shown] for n in names},
        has_more=len(rows) > limit,
        next=str(shown[-1]["step"] + 1) if len(rows) > limit else None,
    )
