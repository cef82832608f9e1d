"""Aliases: movable names of versions, as `champion`, with every move kept: who, when, from where, to where and why.

A rollback undoes the last move that was not undone yet, so that rolling back again goes further back. All functions work in the caller's
write transaction. No torch and no web framework here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from service import audit
from service.adapters import get_version
from service.db import now
from service.errors import Problem
from service.models import Adapter, Alias, AliasMove

# Made once: it is run with every look at the registry.
_OF = select(Alias).where(Alias.adapter_name == bindparam("name")).order_by(Alias.alias)


def move(
    session: Session, by: str, name: str, alias: str, number: int, reason: str | None, gate_job_id: str | None = None
) -> Alias:
    """Point an alias at a version. Pointing it where it is changes nothing and is not noted. Raises Problem."""
    row = locked(session, name, alias)
    get_version(session, name, number)
    if row is None or row.version != number:
        entry = AliasMove(adapter_name=name, alias=alias, to_version=number, reason=reason, gate_job_id=gate_job_id)
        row = _move(session, by, row, entry)
    return row


def roll_back(session: Session, by: str, name: str, alias: str, reason: str | None) -> Alias:
    """Point an alias at the version that it had before its last move. Raises Problem."""
    row = locked(session, name, alias)
    if row is None:
        raise Problem("alias_not_found", "The adapter has no such alias; GET /adapters/{name} lists them.")
    standing: list[int] = []
    query = select(AliasMove).where(AliasMove.adapter_name == name, AliasMove.alias == alias).order_by(AliasMove.id)
    for entry in session.scalars(query):
        if entry.rollback:
            standing.pop()
        else:
            standing.append(entry.to_version)
    past = standing[:-1]
    if not past:
        raise Problem("nothing_to_roll_back", "The alias stands where it began; GET …/history lists its moves.")
    back = AliasMove(adapter_name=name, alias=alias, to_version=past[-1], reason=reason, rollback=True)
    return _move(session, by, row, back)


def of(session: Session, name: str) -> list[Alias]:
    """An adapter's aliases by name."""
    return list(session.scalars(_OF, {"name": name}))


def pointing(session: Session, names: Collection[str]) -> dict[tuple[str, int], list[str]]:
    """The aliases of these adapters, by the version that they point at."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row in session.scalars(select(Alias).where(Alias.adapter_name.in_(names)).order_by(Alias.alias)):
        found[row.adapter_name, row.version].append(row.alias)
    return found


def locked(session: Session, name: str, alias: str) -> Alias | None:
    """The alias, after everybody who moves one of this adapter's is done."""
    if session.get(Adapter, name, with_for_update=True) is None:
        raise Problem("adapter_not_found", "No adapter has this name; GET /adapters lists them.")
    return session.get(Alias, (name, alias), populate_existing=True)


def _move(session: Session, by: str, row: Alias | None, entry: AliasMove) -> Alias:
    entry.from_version, entry.actor = row.version if row else None, by
    if row is None:
        row = Alias(adapter_name=entry.adapter_name, alias=entry.alias, version=entry.to_version)
        session.add(row)
    row.version, row.updated_at = entry.to_version, now()
    session.add(entry)
    session.flush()
    action = "alias.rollback" if entry.rollback else "alias.move"
    subject = f"{entry.adapter_name}@{entry.alias}"
    audit.record(session, by, action, subject, from_version=entry.from_version, to_version=entry.to_version)
    return row
