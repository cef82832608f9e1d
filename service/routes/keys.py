"""API keys and the audit, for the scope `admin`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Body, Path, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import select

from service import keys
from service.models import ApiKey, AuditEntry
from service.pages import AfterKey, AfterNumber, Limit, Page, page
from service.routing import Router
from service.state import Service, Who

router = Router(tags=["keys"])
KeyId = Annotated[str, Path(max_length=40, examples=["key_019ab2c4d5e6f708192a3b4c5d6e"])]
ScopeName = Literal["vqa", "align", "admin"]


class KeyRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "ward 7", "scopes": ["vqa"], "expires_s": 7776000}]}
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
    scopes: Annotated[list[ScopeName], Field(min_length=1, max_length=3)]
    expires_s: float | None = Field(None, gt=0, le=10 * 366 * 86400, allow_inf_nan=False)
    waiting_max: int | None = Field(
        None, ge=0, le=10**6, description="Most of its jobs that wait; default: the service's."
    )
    running_max: int | None = Field(None, ge=1, le=10**6, description="Most of its jobs that run at once.")


class RotateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keep_s: float = Field(0, ge=0, le=30 * 86400, allow_inf_nan=False, description="The old secret goes on this long.")


class KeyView(BaseModel):
    id: str
    name: str
    shown: str = Field(description="How its secret begins.")
    scopes: list[str]
    waiting_max: int | None
    running_max: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")


class NewKeyView(KeyView):
    secret: str = Field(description="Shown this once.")


class AuditView(BaseModel):
    number: int
    at: datetime
    actor: str
    action: str
    subject: str
    data: dict[str, Any]
    previous: str
    digest: str


@router.get("/keys", summary="Keys, newest first")
def index(state: Service, limit: Limit = 50, after: AfterKey = None) -> Page[KeyView]:
    query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit + 1)
    with state.database.read() as session:
        rows = session.scalars(query.where(ApiKey.id < after) if after else query).all()
    return Page(**page(rows, limit, _view, lambda row: row.id))


@router.post("/keys", status_code=201, summary="Make a key")
def create(state: Service, who: Who, request: KeyRequest) -> NewKeyView:
    """Its secret is in this answer and nowhere else. From the first key on, callers on this machine need one too."""
    with state.database.write() as session:
        key, secret = keys.create(session, who.id, **request.model_dump())
    return NewKeyView(**_view(key).model_dump(), secret=secret)


@router.post("/keys/{key_id}/rotate", summary="A new secret for a key")
def rotate(
    state: Service, who: Who, key_id: KeyId, request: Annotated[RotateRequest | None, Body()] = None
) -> NewKeyView:
    with state.database.write() as session:
        key, secret = keys.rotate(session, who.id, key_id, request.keep_s if request else 0.0)
    return NewKeyView(**_view(key).model_dump(), secret=secret)


@router.delete("/keys/{key_id}", status_code=204, summary="Revoke a key")
def revoke(state: Service, who: Who, key_id: KeyId) -> None:
    """At once, on every replica. Its jobs go on."""
    with state.database.write() as session:
        keys.revoke(session, who.id, key_id)


@router.get("/audit", summary="Every change, oldest first")
def audit_entries(
    state: Service,
    limit: Limit = 50,
    after: AfterNumber = 0,
    subject: Annotated[str | None, Query(max_length=200)] = None,
    actor: Annotated[str | None, Query(max_length=40)] = None,
) -> Page[AuditView]:
    """Who did what to which thing. `hscr audit verify` checks the chain."""
    query = select(AuditEntry).where(AuditEntry.number > after).order_by(AuditEntry.number).limit(limit + 1)
    query = query.where(AuditEntry.subject == subject) if subject else query
    query = query.where(AuditEntry.actor == actor) if actor else query
    with state.database.read() as session:
        rows = session.scalars(query).all()
    return Page(**page(rows, limit, lambda r: AuditView.model_validate(r, from_attributes=True), lambda r: r.number))


def _view(key: ApiKey) -> KeyView:
    return KeyView.model_validate(key, from_attributes=True)
