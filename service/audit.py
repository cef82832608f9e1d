"""The audit: every change that somebody asked for, append-only and chained by hashes, so that a changed or missing row is found.

An entry says who did what to which thing, with ids and numbers; never a text that a caller wrote. It is written in the transaction of the
change, last, for the chain's head is held until that commits. Reads are not audited. No torch and no web framework here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from hscr.artifacts import json_digest
from service.db import now
from service.models import AuditEntry, AuditHead

START = "sha256:" + "0" * 64  # what the first entry is chained to
FINDINGS_MAX = 20


@dataclass
class Verdict:
    """What verify saw: how many entries, the chain's end, and what is wrong (nothing: whole)."""

    entries: int = 0
    number: int = 0
    digest: str = START
    findings: list[str] = field(default_factory=list)

    def find(self, what: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(what)


def record(session: Session, actor: str, action: str, subject: str, **data: Any) -> None:
    """Append one entry in the caller's write transaction; `actor` is a key's id, `local`, `cli` or `worker`."""
    # The update takes the head's row lock: entries are chained one after the other, whoever writes them.
    head = session.execute(
        update(AuditHead)
        .where(AuditHead.id == 1)
        .values(number=AuditHead.number + 1)
        .returning(AuditHead.number, AuditHead.digest)
    ).one()
    entry = AuditEntry(
        number=head.number, at=now(), actor=actor, action=action, subject=subject, data=data, previous=head.digest
    )
    entry.digest = _digest(entry)
    session.add(entry)
    session.execute(update(AuditHead).where(AuditHead.id == 1).values(digest=entry.digest))
    session.flush()


def verify(session: Session, expect: tuple[int, str] | None = None) -> Verdict:
    """Walk the whole chain. `expect` is a number and digest that was noted elsewhere before: without one, a cut-off end whose head was
    set back with it cannot be seen.
    """
    seen = Verdict()
    query = select(AuditEntry).order_by(AuditEntry.number).execution_options(yield_per=1000)
    for entry in session.scalars(query):
        if entry.number != seen.number + 1:
            seen.find(f"entries {seen.number + 1} to {entry.number - 1} are missing")
        elif entry.previous != seen.digest:
            seen.find(f"entry {entry.number} does not follow from entry {seen.number}")
        if entry.digest != _digest(entry):
            seen.find(f"entry {entry.number} was changed")
        if expect is not None and expect[0] == entry.number and expect[1] != entry.digest:
            seen.find(f"entry {entry.number} is not the one that was noted")
        seen.entries, seen.number, seen.digest = seen.entries + 1, entry.number, entry.digest
    head = session.get(AuditHead, 1)
    if head is None or (head.number, head.digest) != (seen.number, seen.digest):
        seen.find(f"the chain ends with entry {seen.number}, but its head says {head.number if head else 'nothing'}")
    if expect is not None and expect[0] > seen.number:
        seen.find(f"entry {expect[0]}, which was noted, is missing")
    return seen


def _digest(entry: AuditEntry) -> str:
    at = entry.at.astimezone(UTC).isoformat(timespec="microseconds")
    return json_digest([entry.number, at, entry.actor, entry.action, entry.subject, entry.data, entry.previous])
