"""Adapters: names, immutable versions with their tags and notes, download."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import File, Path, Query, Response, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from service import adapter_upload, adapters, aliases, artifact_store, audit
from service.models import Adapter, AdapterVersion, Alias, VersionTag
from service.pages import After, Limit, Page, page
from service.routing import Router
from service.state import Service, Who
from service.written import written

router = Router(prefix="/adapters", tags=["adapters"])
Name = Annotated[str, Path(pattern=adapters.NAME, examples=["brain-mri"])]
AliasName = Annotated[str, Path(pattern=adapters.NAME, examples=["champion"])]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]
TAG = r"^[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}$"
Tag = Annotated[str, StringConstraints(pattern=TAG)]


class AdapterView(BaseModel):
    name: str
    last_version: int
    created_at: datetime


class AliasView(BaseModel):
    alias: str
    version: int
    updated_at: datetime


class AdapterDetail(AdapterView):
    aliases: list[AliasView]
    versions: list[int] = Field(description="The newest hundred, newest first.")


class FlagView(BaseModel):
    auroc: float | None = Field(
        description="Probability that a wrong answer's grounding score is below a right one's, on the job's evaluation data."
    )
    threshold: float | None = Field(
        description="In nats; answers that score lower are flagged. Null where the evaluation could not carry one; the report says why."
    )


class VersionView(BaseModel):
    name: str
    version: int
    digest: str
    model: str
    source: Literal["job", "upload"]
    job_id: str | None = Field(description="With the data set null where the version was uploaded.")
    dataset_id: str | None
    dataset_digest: str | None
    config: dict[str, Any]
    metrics: dict[str, Any]
    grounding: FlagView
    preferences_digest: str | None
    tags: list[str]
    notes: str | None
    aliases: list[str] = Field(description="Those that point at it now.")
    download_url: str
    created_at: datetime


class AnnotateRequest(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"tags": ["approved"], "notes": "Read by Dr. N., 12 May."}]}
    )

    tags: Annotated[list[Tag], Field(max_length=50)] | None = None
    notes: Annotated[str, StringConstraints(max_length=10_000)] | None = None


# Made once: to build a statement costs as much as to run it.
_PAGE = select(Adapter).where(Adapter.name > bindparam("after")).order_by(Adapter.name).limit(bindparam("most"))
_V = AdapterVersion.__table__.c
_NUMBERS = select(_V.version).where(_V.adapter_name == bindparam("name")).order_by(_V.version.desc()).limit(100)


@router.get("", summary="Adapters by name")
@written
def index(state: Service, limit: Limit = 50, after: After = None) -> Page[AdapterView]:
    with state.database.read() as session:
        rows = session.scalars(_PAGE, {"after": after or "", "most": limit + 1}).all()
    return Page[AdapterView](
        **page(rows, limit, lambda r: AdapterView.model_validate(r, from_attributes=True), lambda r: r.name)
    )


@router.get("/{name}", summary="One adapter with its aliases")
@written
def show(state: Service, name: Name) -> AdapterDetail:
    with state.database.read() as session:
        adapter = adapters.get(session, name)
        return AdapterDetail(
            name=adapter.name,
            last_version=adapter.last_version,
            created_at=adapter.created_at,
            aliases=[alias_view(a) for a in aliases.of(session, name)],
            versions=list(session.scalars(_NUMBERS, {"name": name})),
        )


@router.get("/{name}/versions/{version}", summary="One version: from its digest to its job and data")
@written
def show_version(state: Service, name: Name, version: Number) -> VersionView:
    with state.database.read() as session:
        return _views(session, [adapters.get_version(session, name, version)])[0]


@router.get("/{name}/versions", summary="An adapter's versions, newest first")
@written
def index_versions(
    state: Service,
    name: Name,
    limit: Limit = 50,
    after: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="The `next` of the page before.")] = None,
    tag: Annotated[str | None, Query(pattern=TAG, description="Only versions with this tag.")] = None,
) -> Page[VersionView]:
    query = select(AdapterVersion).where(AdapterVersion.adapter_name == name)
    query = query.where(AdapterVersion.version < after) if after else query
    if tag is not None:
        tagged = select(VersionTag.version).where(VersionTag.adapter_name == name, VersionTag.tag == tag)
        query = query.where(AdapterVersion.version.in_(tagged))
    with state.database.read() as session:
        adapters.get(session, name)
        rows = session.scalars(query.order_by(AdapterVersion.version.desc()).limit(limit + 1)).all()
        views = _views(session, rows)
    return Page[VersionView](**page(views, limit, lambda view: view, lambda view: view.version))


@router.post("/{name}/versions", status_code=201, summary="Upload a PEFT adapter")
def upload(
    state: Service,
    who: Who,
    response: Response,
    name: Name,
    file: Annotated[
        UploadFile, File(description="A zip of the folder that PEFT's save_pretrained writes: a plain LoRA.")
    ],
) -> VersionView:
    """Checked before anything loads it: safetensors only, shapes of the served base, finite numbers. Only numbers, rank, scale and module
    names are kept. The same weights under the same name are the same version: 200 with what is there.
    """
    row, new = adapter_upload.upload(state.database, state.settings, state.artifacts, who.id, name, file.file)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/adapters/{name}/versions/{row.version}"
    with state.database.read() as session:
        return _views(session, [adapters.get_version(session, name, row.version)])[0]


@router.patch("/{name}/versions/{version}", summary="Set a version's tags and notes")
def annotate(state: Service, who: Who, name: Name, version: Number, request: AnnotateRequest) -> VersionView:
    """All else of a version is immutable."""
    with state.database.write() as session:
        row = adapters.get_version(session, name, version)
        if adapters.annotate(session, row, request.tags, request.notes):
            fields = sorted(request.model_fields_set)
            audit.record(session, who.id, "version.annotate", f"{name}:{version}", fields=fields)
        return _views(session, [row])[0]


@router.get("/{name}/versions/{version}/download", summary="The PEFT folder as a zip", response_class=FileResponse)
def download(state: Service, name: Name, version: Number) -> FileResponse:
    """A folder that stock `peft` and vLLM load, with its sha256 manifest; checked before it is sent."""
    with state.database.read() as session:
        row = adapters.get_version(session, name, version)
    with state.artifacts.lent(artifact_store.adapter(row.digest), check=True) as folder:
        path = _zip(folder, f"{name}-{version}")
    return FileResponse(
        path,
        media_type="application/zip",
        filename=f"{name}-{version}.zip",
        headers={"Digest-Manifest": row.digest},
        background=BackgroundTask(os.unlink, path),
    )


def alias_view(row: Alias) -> AliasView:
    return AliasView.model_validate(row, from_attributes=True)


def _views(session: Session, rows: Sequence[AdapterVersion]) -> list[VersionView]:
    """The public form of versions of one adapter, with two questions however many they are."""
    if not rows:
        return []
    name = rows[0].adapter_name
    tags, pointing = adapters.tags(session, name, [row.version for row in rows]), aliases.of(session, name)
    return [_view(row, tags[row.version], [a.alias for a in pointing if a.version == row.version]) for row in rows]


def _view(row: AdapterVersion, tags: list[str], names: list[str]) -> VersionView:
    return VersionView(
        name=row.adapter_name,
        version=row.version,
        digest=row.digest,
        model=row.model,
        source=row.source,  # type: ignore[arg-type]
        job_id=row.job_id,
        dataset_id=row.dataset_id,
        dataset_digest=row.dataset_digest,
        config=row.config,
        metrics=row.metrics,
        grounding=FlagView(**adapters.flag(row)),
        preferences_digest=row.preferences_digest,
        tags=tags,
        notes=row.notes,
        aliases=names,
        download_url=f"/adapters/{row.adapter_name}/versions/{row.version}/download",
        created_at=row.created_at,
    )


def _zip(folder: FilePath, top: str) -> str:
    """A zip of the folder in a temporary file, stored rather than deflated: weights do not compress."""
    descriptor, path = tempfile.mkstemp(suffix=".zip")
    with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(source, f"{top}/{source.relative_to(folder).as_posix()}")
    return path
