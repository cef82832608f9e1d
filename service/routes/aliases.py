"""Aliases of an adapter: move, roll back, history."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Body, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from service import adapters, aliases, gates, job_requests, jobs
from service.models import AliasMove
from service.pages import AfterNumber, Limit, Page, page
from service.routes.adapters import AliasName, AliasView, Name, alias_view
from service.routes.evaluate import check_served, evaluation_config
from service.routes.gates import GateRequest, GateView, Reason, gate_view
from service.routing import Router
from service.state import Service, Who

router = Router(prefix="/adapters", tags=["adapters"])


class AliasRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"version": 2, "reason": "better on chest CT"}]}
    )

    version: int = Field(ge=1, le=2**31 - 1)
    reason: Reason = None
    gate: GateRequest | None = Field(None, description="Move only if an evaluation allows it; 202, for that is a job.")


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
    gate_job_id: str | None = Field(description="The evaluation that let it pass.")
    created_at: datetime


@router.put(
    "/{name}/aliases/{alias}",
    summary="Point an alias at a version, with a gate only if an evaluation allows it",
    responses={202: {"model": GateView, "description": "A gate: the job decides"}},
)
def move(
    state: Service, who: Who, response: Response, name: Name, alias: AliasName, request: AliasRequest
) -> AliasView | GateView:
    """Every move is kept, with who and why, and every decision of a gate. Asking for the same gate again finds the one under way."""
    with state.database.write() as session:
        if request.gate is None:
            return alias_view(aliases.move(session, who.id, name, alias, request.version, request.reason))
        there = gates.check_not_there(session, name, alias, request.version)
        if there is not None:
            return alias_view(there)
        version = adapters.get_version(session, name, request.version)
        check_served(state, version)
        job_requests.check_room(session, who.id, state.settings.key_waiting_max)
        wish = request.gate
        gate = gates.ask(
            session,
            who.id,
            name,
            alias,
            request.version,
            dataset_id=wish.dataset,
            rule=wish.stated(),
            config=evaluation_config(version.config, wish.evaluation, None),
            reason=request.reason,
        )
        response.status_code = 202
        response.headers["Location"] = f"/jobs/{gate.job_id}"
        return gate_view(gate, jobs.statuses(session, [gate.job_id])[gate.job_id])


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
