"""The public form of a job: what a caller sees of its row, of what lies ahead of it, and of what it made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from service import datasets, jobs
from service.models import AdapterVersion, Job
from service.outlook import Ahead, Outlook

Status = Literal["queued", "running", "paused", "awaiting_review", "succeeded", "failed", "cancelled"]


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


class PromoteGate(BaseModel):
    dataset_id: str
    rule: dict[str, Any]


class PromoteView(BaseModel):
    """What POST /align asked for."""

    alias: str
    reason: str | None
    gate: PromoteGate | None = Field(description="Null: the alias moves without one.")


class PromotionView(BaseModel):
    """What came of it."""

    decision: Literal["moved", "pending", "refused", "overtaken", "impossible"]
    gate_job_id: str | None = Field(None, description="The evaluation that decides, or has decided.")
    gate_job_status: Status | None = Field(None, description="`failed` and `cancelled`: the decision stays pending.")
    decisions_url: str | None = Field(None, description="The decisions about the alias, this one among them.")
    code: str | None = Field(None, description="Of the problem that made it impossible.")
    message: str | None = None


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
    promote: PromoteView | None = Field(None, description="What becomes of its version; null: nothing was asked for.")
    promotion: PromotionView | None = Field(
        default=None,
        description="What became of it. Only in GET /jobs/{id}; null: no version yet, nothing asked for, or the job deleted.",
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


def job_view(session: Session, job: Job) -> JobView:
    """The public form of a job in somebody's transaction. Also the body that POST /align stores for replays."""
    return job_views(session, [job])[0]


def job_views(session: Session, rows: Sequence[Job]) -> list[JobView]:
    outlook, made = Outlook(session), _made_by(session, rows)
    return [_job_view(session, row, outlook, made.get(row.id)) for row in rows]


def _job_view(session: Session, job: Job, outlook: Outlook, made: VersionRef | None) -> JobView:
    ahead = Ahead() if job.status in jobs.ENDED else outlook.of(job)
    tested = job.evaluation_dataset_id
    digests = (
        datasets.facts(session, job.dataset_id).digest,
        datasets.facts(session, tested).digest if tested else None,
    )
    return view(job, ahead, made, digests)


def _made_by(session: Session, rows: Sequence[Job]) -> dict[str, VersionRef]:
    """The versions that these jobs made, by job: a job makes one when it succeeds, not before."""
    ids = [job.id for job in rows if job.status == "succeeded" and job.kind == "align"]
    found = session.scalars(select(AdapterVersion).where(AdapterVersion.job_id.in_(ids))) if ids else ()
    return {str(v.job_id): VersionRef(name=v.adapter_name, version=v.version, digest=v.digest) for v in found}


def view(job: jobs.JobRow, ahead: Ahead, made: VersionRef | None, digests: tuple[str, str | None]) -> JobView:
    """`made`: the version that it made; `digests`: of the data set, and of the one to evaluate on."""
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
        promotion=None,
        promote=_promote(job.promote),
        metrics=job.metrics,
        stage_seconds=job.stage_seconds,
        error=JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
        attempts=job.attempts,
        lineage=Lineage(
            dataset=DatasetRef(id=job.dataset_id, digest=digests[0]),
            evaluation_dataset=DatasetRef(id=job.evaluation_dataset_id, digest=digests[1])
            if job.evaluation_dataset_id and digests[1]
            else None,
            adapter=made,
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


def _promote(wish: dict[str, Any] | None) -> PromoteView | None:
    if wish is None:
        return None
    gate = wish["gate"]
    shown = PromoteGate(dataset_id=gate["dataset_id"], rule=gate["rule"]) if gate else None
    return PromoteView(alias=wish["alias"], reason=wish["reason"], gate=shown)
