"""GET /v1/models: what this service answers as, in OpenAI's shape: the base model, every adapter version of it, every alias.

`root` is what answers in the end (an alias's version), `parent` the base model below it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy import select

from service.adapters import get_version
from service.models import AdapterVersion, Alias
from service.routes.chat import version_of
from service.routing import Router
from service.state import Service, State

router = Router(prefix="/v1/models", tags=["openai"])
OWNER = "hscr"


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = OWNER
    root: str = Field(description="The immutable version that the name means now; of the base model its own id.")
    parent: str | None = Field(description="The base model; null for itself.")
    digest: str | None = Field(None, description="Of the adapter's weights.")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("", summary="What may stand in `model`")
def models(state: Service) -> Models:
    """A bare `name` may stand there too: its alias `champion`, else its newest version."""
    base = state.settings.model_id
    versions = select(AdapterVersion).where(AdapterVersion.model == base)
    with state.database.read() as session:
        rows = list(session.scalars(versions.order_by(AdapterVersion.adapter_name, AdapterVersion.version)))
        known = {(row.adapter_name, row.version): row for row in rows}
        aliases = list(session.scalars(select(Alias).order_by(Alias.adapter_name, Alias.alias)))
    data = [_base(state), *(_version(base, row, _name(row)) for row in rows)]
    for alias in aliases:
        if (row := known.get((alias.adapter_name, alias.version))) is not None:
            data.append(_version(base, row, f"{alias.adapter_name}@{alias.alias}"))
    return Models(data=data)


@router.get("/{model:path}", summary="One of them")
def model(state: Service, model: str) -> Model:
    if model == state.settings.model_id:
        return _base(state)
    resolved = version_of(state, model)
    with state.database.read() as session:
        return _version(state.settings.model_id, get_version(session, resolved.name, resolved.version), model)


def _name(row: AdapterVersion) -> str:
    return f"{row.adapter_name}:{row.version}"


def _base(state: State) -> Model:
    base = state.settings.model_id
    return Model(id=base, created=0, root=base, parent=None, digest=None)


def _version(base: str, row: AdapterVersion, name: str) -> Model:
    made: datetime = row.created_at if row.created_at.tzinfo else row.created_at.replace(tzinfo=UTC)
    return Model(id=name, created=int(made.timestamp()), root=_name(row), parent=base, digest=row.digest)
