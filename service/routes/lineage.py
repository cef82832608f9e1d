"""Lineage, both ways: what an answer's version rests on, and what came of a data set."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from service import adapters, aliases, datasets, lineage
from service.errors import Problem
from service.models import AdapterVersion, Dataset, Job
from service.pages import AfterJob, Limit, Page, page
from service.routes.adapters import Name, Number
from service.routes.datasets import DatasetId
from service.routes.job_view import VersionRef
from service.routing import Router
from service.state import Service

router = Router(tags=["lineage"])
Use = Literal["alignment", "evaluation"]
AfterVersion = Annotated[
    str | None,
    Query(pattern=r"^[a-z0-9][a-z0-9._\-]{0,63}:[0-9]{1,9}$", description="The `next` of the page before."),
]


class DataView(BaseModel):
    id: str
    name: str
    version: int
    digest: str
    n_records: int
    records_url: str


class JobRef(BaseModel):
    id: str
    owner: str = Field(description="Id of the key that asked for it; `env` or `local` without one.")
    created_at: datetime
    deleted_at: datetime | None


class ReviewView(BaseModel):
    """What a person changed between generation and optimisation."""

    digest: str = Field(description="Of the corrections.")
    generated_digest: str = Field(description="Of the preference records before them.")
    records_rejected: int
    levels_rejected: int
    levels_corrected: int


class OriginView(BaseModel):
    """From a version to its rows."""

    version: VersionRef
    model: str
    parent: VersionRef | None = Field(
        description="The version that it was aligned on top of; its lineage goes on from there."
    )
    aliases: list[str] = Field(description="Those that point at it now.")
    job: JobRef | None = Field(description="Null: the version was uploaded, and where it comes from is not known here.")
    preferences_digest: str | None = Field(description="Of the preference records that it was optimised on.")
    review: ReviewView | None = Field(description="Null: nothing was corrected.")
    dataset: DataView | None
    evaluation_dataset: DataView | None


class UseView(BaseModel):
    """One job that used a data set."""

    job_id: str
    status: str
    use: list[Use]
    version: VersionRef | None
    aliases: list[str]


@router.get("/adapters/{name}/versions/{version}/lineage", summary="From a version back to its rows")
def of_version(state: Service, name: Name, version: Number) -> OriginView:
    with state.database.read() as session:
        return _origin(lineage.origins(session, [adapters.get_version(session, name, version)])[0])


@router.get("/lineage", summary="From an answer's adapter digest back to its rows")
def of_digest(
    state: Service,
    digest: Annotated[str, Query(pattern=r"^sha256:[0-9a-f]{64}$", description="`adapter.digest`.")],
    limit: Limit = 50,
    after: AfterVersion = None,
) -> Page[OriginView]:
    """One entry a version with these very weights, by name and version; usually one."""
    name, _, number = (after or ":0").rpartition(":")
    with state.database.read() as session:
        rows = lineage.versions_of_digest(session, digest, (name, int(number)), limit + 1)
        views = [_origin(found) for found in lineage.origins(session, rows)]
    if not views and after is None:
        raise Problem("version_not_found", "No version has this digest; answers name theirs in `adapter.digest`.")
    return Page(**page(views, limit, lambda view: view, lambda view: f"{view.version.name}:{view.version.version}"))


@router.get("/datasets/{dataset_id}/lineage", summary="What came of a data set")
def of_dataset(state: Service, dataset_id: DatasetId, limit: Limit = 50, after: AfterJob = None) -> Page[UseView]:
    """The jobs that learnt from it or were evaluated on it, oldest first, with their versions and the aliases on them."""
    with state.database.read() as session:
        datasets.get(session, dataset_id)
        rows = lineage.jobs_on(session, dataset_id, after or "", limit + 1)
        pointing = aliases.pointing(session, {made.adapter_name for _, made in rows if made})
        views = [
            UseView(
                job_id=job.id,
                status=job.status,
                use=_use(job, dataset_id),
                version=VersionRef(name=made.adapter_name, version=made.version, digest=made.digest) if made else None,
                aliases=pointing.get((made.adapter_name, made.version), []) if made else [],
            )
            for job, made in rows
        ]
    return Page(**page(views, limit, lambda view: view, lambda view: view.job_id))


def _use(job: Job, dataset_id: str) -> list[Use]:
    learnt = job.dataset_id if job.kind == "align" else None
    uses: dict[Use, str | None] = {"alignment": learnt, "evaluation": job.evaluation_dataset_id}
    return [use for use, used in uses.items() if used == dataset_id]


def _origin(found: lineage.Origin) -> OriginView:
    version = found.version
    return OriginView(
        version=_ref(version),
        parent=_ref(found.parent) if found.parent else None,
        model=version.model,
        aliases=found.aliases,
        job=JobRef.model_validate(found.job, from_attributes=True) if found.job else None,
        preferences_digest=version.preferences_digest,
        review=ReviewView(**version.review) if version.review else None,
        dataset=_data(found.dataset) if found.dataset else None,
        evaluation_dataset=_data(found.evaluation_dataset) if found.evaluation_dataset else None,
    )


def _ref(version: AdapterVersion) -> VersionRef:
    return VersionRef(name=version.adapter_name, version=version.version, digest=version.digest)


def _data(row: Dataset) -> DataView:
    return DataView(
        id=row.id,
        name=row.name,
        version=row.version,
        digest=row.digest,
        n_records=row.n_records,
        records_url=f"/datasets/{row.id}/records",
    )
