"""Adapters: names, immutable versions, aliases, download."""

from __future__ import annotations

import os
import tempfile
import zipfile
from datetime import datetime
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from starlette.background import BackgroundTask

from hscr.artifacts import verify_manifest
from service import adapters
from service.errors import Problem
from service.models import Adapter, AdapterVersion, Alias, AliasMove
from service.pages import After, AfterNumber, Limit, Page, page
from service.state import Service

router = APIRouter(prefix="/adapters", tags=["adapters"])
Name = Annotated[str, Path(pattern=adapters.NAME, examples=["brain-mri"])]
AliasName = Annotated[str, Path(pattern=adapters.NAME, examples=["champion"])]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


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
    job_id: str
    dataset_id: str
    dataset_digest: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    grounding: FlagView
    download_url: str
    created_at: datetime


class AliasRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"version": 2, "reason": "better on chest CT"}]}
    )

    version: int = Field(ge=1, le=2**31 - 1)
    reason: str | None = Field(None, max_length=500)


class MoveView(BaseModel):
    id: int
    alias: str
    from_version: int | None
    to_version: int
    reason: str | None
    created_at: datetime


@router.get("", summary="Adapters by name")
def index(state: Service, limit: Limit = 50, after: After = None) -> Page[AdapterView]:
    query = select(Adapter).order_by(Adapter.name).limit(limit + 1)
    with state.database.read() as session:
        rows = session.scalars(query.where(Adapter.name > after) if after else query).all()
    return Page(**page(rows, limit, lambda r: AdapterView.model_validate(r, from_attributes=True), lambda r: r.name))


@router.get("/{name}", summary="One adapter with its aliases")
def show(state: Service, name: Name) -> AdapterDetail:
    with state.database.read() as session:
        adapter = adapters.get(session, name)
        numbers = select(AdapterVersion.version).where(AdapterVersion.adapter_name == name)
        return AdapterDetail(
            name=adapter.name,
            last_version=adapter.last_version,
            created_at=adapter.created_at,
            aliases=[_alias(a) for a in adapters.aliases(session, name)],
            versions=list(session.scalars(numbers.order_by(AdapterVersion.version.desc()).limit(100))),
        )


@router.get("/{name}/versions/{version}", summary="One version: from its digest to its job and data")
def show_version(state: Service, name: Name, version: Number) -> VersionView:
    with state.database.read() as session:
        return _version(adapters.get_version(session, name, version))


@router.get("/{name}/versions/{version}/download", summary="The PEFT folder as a zip", response_class=FileResponse)
def download(state: Service, name: Name, version: Number) -> FileResponse:
    """A folder that stock `peft` and vLLM load, with its sha256 manifest; checked before it is sent."""
    with state.database.read() as session:
        row = adapters.get_version(session, name, version)
    folder = adapters.folder(state.settings.data_dir, row.digest)
    try:
        verify_manifest(folder, row.digest)
    except ValueError:
        raise Problem("artifact_damaged", "The stored adapter fails its digest; restore it from a backup.") from None
    path = _zip(folder, f"{name}-{version}")
    return FileResponse(
        path,
        media_type="application/zip",
        filename=f"{name}-{version}.zip",
        headers={"Digest-Manifest": row.digest},
        background=BackgroundTask(os.unlink, path),
    )


@router.put("/{name}/aliases/{alias}", summary="Point an alias at a version")
def move(state: Service, name: Name, alias: AliasName, request: AliasRequest) -> AliasView:
    """Moves are kept; moving it back is a rollback."""
    with state.database.write() as session:
        return _alias(adapters.set_alias(session, name, alias, request.version, request.reason))


@router.get("/{name}/aliases/{alias}/history", summary="An alias's moves, oldest first")
def history(state: Service, name: Name, alias: AliasName, limit: Limit = 50, after: AfterNumber = 0) -> Page[MoveView]:
    query = select(AliasMove).where(AliasMove.adapter_name == name, AliasMove.alias == alias, AliasMove.id > after)
    with state.database.read() as session:
        adapters.get(session, name)
        rows = session.scalars(query.order_by(AliasMove.id).limit(limit + 1)).all()
    return Page(**page(rows, limit, lambda r: MoveView.model_validate(r, from_attributes=True), lambda r: r.id))


def _alias(row: Alias) -> AliasView:
    return AliasView.model_validate(row, from_attributes=True)


def _version(row: AdapterVersion) -> VersionView:
    return VersionView(
        name=row.adapter_name,
        version=row.version,
        digest=row.digest,
        model=row.model,
        job_id=row.job_id,
        dataset_id=row.dataset_id,
        dataset_digest=row.dataset_digest,
        config=row.config,
        metrics=row.metrics,
        grounding=FlagView(**adapters.flag(row)),
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
