"""Aliases of an adapter: move, roll back, history."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Body, Path
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from service import adapters, aliases
from service.models import AliasMove
from service.pages import AfterNumber, Limit, Page, page
from service.routes.adapters import AliasView, Name, alias_view
from service.state import Service, Who

router = APIRouter(prefix="/adapters", tags=["adapters"])
AliasName = Annotated[str, Path(pattern=adapters.NAME, examples=["champion"])]
Reason = Annotated[str | None, Field(max_length=500, description="Why; kept in the history.")]


class AliasRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"version": 2, "reason": "better on chest CT"}]}
    )

    version: int = Field(ge=1, le=2**31 - 1)
    reason: Reason = None


class RollbackRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "complaints from ward 7"}]})

    reason: Reason = None


class MoveView(BaseModel):
    id: int
    alias: str
    from_version: int | None
    to_version: int
    rollback: bool
    actor: str = Field(description="Id of the key that moved it; `env` or `local` without one.")
    reason: str | None
    created_at: datetime


@router.put("/{name}/aliases/{alias}", summary="Point an alias at a version")
def move(state: Service, who: Who, name: Name, alias: AliasName, request: AliasRequest) -> AliasView:
    """Every move is kept, with who and why."""
    with state.database.write() as session:
        return alias_view(aliases.move(session, who.id, name, alias, request.version, request.reason))


@router.post("/{name}/aliases/{alias}/rollback", summary="Undo an alias's last move")
def rollback(
    state: Service, who: Who, name: Name, alias: AliasName, request: Annotated[RollbackRequest | None, Body()] = None
) -> AliasView:
    """It points at the version that it had before; once more goes further back. Rollbacks are in the history too."""
    with state.database.write() as session:
        return alias_view(aliases.roll_back(session, who.id, name, alias, request.reason if request else None))


@router.get("/{name}/aliases/{alias}/history", summary="An alias's moves, oldest first")
def history(state: Service, name: Name, alias: AliasName, limit: Limit = 50, after: AfterNumber = 0) -> Page[MoveView]:
    query = select(AliasMove).where(AliasMove.adapter_name == name, AliasMove.alias == alias, AliasMove.id > after)
    with state.database.read() as session:
        adapters.get(session, name)
        rows = session.scalars(query.order_by(AliasMove.id).limit(limit + 1)).all()
    return Page(**page(rows, limit, lambda r: MoveView.model_validate(r, from_attributes=True), lambda r: r.id))
