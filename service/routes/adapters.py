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
from sqlalchemy import Dialect, Text, bindparam, cast, func, select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from service import adapter_upload, adapters, aliases, artifact_store, audit, thresholds
from service.look import Look, Raw
from service.models import Adapter, AdapterVersion, Alias, VersionTag
from service.pages import After, Limit, Page, page, page_text
from service.routing import Router
from service.state import Service, Who
from service.written import kept, written

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
        description="Probability that a wrong answer's grounding score is below a right one's, on the evaluation's data."
    )
    threshold: float | None = Field(description="In nats; answers that score lower are flagged. Null: see `reason`.")
    reason: str | None = Field(description="Why there is no threshold; null where there is one.")
    evaluation: str | None = Field(
        description="Id of the job whose evaluation gave these: the newest of the version with a threshold, else the newest with an AUROC."
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


# One statement a look. Words of many rows come as one text with commas, which neither a tag nor an alias can hold.
_A, _L = Adapter.__table__.c, Alias.__table__.c
_V, _T = AdapterVersion.__table__.c, VersionTag.__table__.c
_PAGE = Look(
    select(_A.name, _A.last_version, _A.created_at)
    .where(_A.name > bindparam("after"))
    .order_by(_A.name)
    .limit(bindparam("most"))
)
_NEWEST = (
    select(_V.version).where(_V.adapter_name == bindparam("name")).order_by(_V.version.desc()).limit(100).subquery()
)
_ADAPTER = Look(
    select(
        _A.name,
        _A.last_version,
        _A.created_at,
        select(func.aggregate_strings(cast(_NEWEST.c.version, Text), ",")).scalar_subquery().label("versions"),
        _L.alias,
        _L.version,
        _L.updated_at,
    )
    .select_from(Adapter.__table__.outerjoin(Alias.__table__, _L.adapter_name == _A.name))
    .where(_A.name == bindparam("name"))
    .order_by(_L.alias)
)
_TAGS = select(func.aggregate_strings(_T.tag, ",")).where(_T.adapter_name == _V.adapter_name, _T.version == _V.version)
_POINTING = select(func.aggregate_strings(_L.alias, ","))
_POINTING = _POINTING.where(_L.adapter_name == _V.adapter_name, _L.version == _V.version)
_VERSION = Look(
    select(
        *_V,
        _TAGS.scalar_subquery().label("tags"),
        _POINTING.scalar_subquery().label("aliases"),
        thresholds.EVALUATED_BY,
        thresholds.EVALUATED,
    ).where(_V.adapter_name == bindparam("name"), _V.version == bindparam("number"))
)


@router.get("", summary="Adapters by name", response_model=Page[AdapterView])
@written
def index(state: Service, limit: Limit = 50, after: After = None) -> str:
    rows = _PAGE.rows(state.database, after=after or "", most=limit + 1)
    return page_text([(row[0], _adapter_text(state.database.engine.dialect, row)) for row in rows], limit)


@router.get("/{name}", summary="One adapter with its aliases", response_model=AdapterDetail)
@written
def show(state: Service, name: Name) -> str:
    rows = _ADAPTER.rows(state.database, name=name)
    if not rows:
        raise adapters.not_found()
    return _detail_text(state.database.engine.dialect, tuple(rows))


@router.get(
    "/{name}/versions/{version}", summary="One version: from its digest to its job and data", response_model=VersionView
)
@written
def show_version(state: Service, name: Name, version: Number) -> str:
    rows = _VERSION.rows(state.database, name=name, number=version)
    if not rows:
        with state.database.read() as session:  # there is none; which of the two it is that there is not
            return _views(session, [adapters.get_version(session, name, version)])[0].model_dump_json()
    return _version_text(state.database.engine.dialect, rows[0])


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


# Each written once for equal rows, as jobs are (service/routes/job_looks.py).
@kept(2**20)
def _adapter_text(dialect: Dialect, raw: Raw) -> str:
    return AdapterView.model_validate(_PAGE.read(dialect, raw), from_attributes=True).model_dump_json()


@kept(2**20)
def _detail_text(dialect: Dialect, raw: tuple[Raw, ...]) -> str:
    rows = [_ADAPTER.read(dialect, row) for row in raw]
    first = rows[0]
    return AdapterDetail(
        name=first.name,
        last_version=first.last_version,
        created_at=first.created_at,
        aliases=[alias_view(row) for row in rows if row.alias is not None],
        versions=sorted(map(int, _words(first.versions)), reverse=True),
    ).model_dump_json()


@kept(8 * 2**20)
def _version_text(dialect: Dialect, raw: Raw) -> str:
    row = _VERSION.read(dialect, raw)
    flag = thresholds.flag(row, row.evaluated_by, row.evaluated)
    return _view(row, _words(row.tags), _words(row.aliases), flag).model_dump_json()


def _words(text: str | None) -> list[str]:
    return text.split(",") if text else []


def alias_view(row: Any) -> AliasView:
    return AliasView.model_validate(row, from_attributes=True)


def _views(session: Session, rows: Sequence[AdapterVersion]) -> list[VersionView]:
    """The public form of versions of one adapter, with three questions however many they are."""
    if not rows:
        return []
    name = rows[0].adapter_name
    numbers = [row.version for row in rows]
    tags, pointing = adapters.tags(session, name, numbers), aliases.of(session, name)
    later = thresholds.later(session, name, numbers)
    return [
        _view(
            row,
            tags[row.version],
            [a.alias for a in pointing if a.version == row.version],
            thresholds.flag(row, *later[row.version]),
        )
        for row in rows
    ]


def _view(row: Any, tags: list[str], names: list[str], flag: thresholds.Flag) -> VersionView:
    return VersionView(
        name=row.adapter_name,
        version=row.version,
        digest=row.digest,
        model=row.model,
        source=row.source,
        job_id=row.job_id,
        dataset_id=row.dataset_id,
        dataset_digest=row.dataset_digest,
        config=row.config,
        metrics=row.metrics,
        grounding=FlagView(**flag.to_dict()),
        preferences_digest=row.preferences_digest,
        tags=sorted(tags),  # as strings here, not by the database's rules of a language
        notes=row.notes,
        aliases=sorted(names),
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
