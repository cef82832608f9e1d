"""API keys: 256 random bits shown once and stored as their digest, with scopes, an end, limits, and when they were last used.

A key keeps its id when its secret is rotated: its jobs, its limits and its entries in the audit stay its own. No web framework here.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

from sqlalchemy import event, or_, select, update
from sqlalchemy.orm import Session

from hscr.artifacts import bytes_digest
from service import audit
from service.db import Database, now
from service.errors import Problem
from service.jobs import LOCAL
from service.models import ApiKey, new_id

SCOPES = ("vqa", "align", "admin")
PREFIX = "hscr_"  # so that scanners of leaked secrets know one
SHOWN = len(PREFIX) + 6
TOUCH_S = 60.0


@dataclass(frozen=True)
class Caller:
    """Who makes a request: the id of a key, `env` (HSCR_API_KEY) or `local` (no key, this machine only)."""

    id: str
    scopes: frozenset[str]

    def may(self, allowed: Iterable[str]) -> bool:
        return "admin" in self.scopes or not self.scopes.isdisjoint(allowed)


ENV = Caller("env", frozenset(SCOPES))
ANYBODY = Caller(LOCAL, frozenset(SCOPES))


_changes = count()
_changed = [next(_changes)]


def changes() -> int:
    """A number that is another one after each change of a key by this process."""
    return _changed[0]


def _on_change(session: Session) -> None:
    """Count before the commit and after it: who looked in between has the number of neither."""
    _changed[0] = next(_changes)
    event.listen(session, "after_commit", lambda _: _changed.__setitem__(0, next(_changes)), once=True)


def create(
    session: Session,
    by: str,
    *,
    name: str,
    scopes: Iterable[str],
    expires_s: float | None = None,
    waiting_max: int | None = None,
    running_max: int | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its secret, which nobody can read again. Raises ValueError."""
    wanted = sorted(set(scopes), key=SCOPES.index) if set(scopes) <= set(SCOPES) else []
    if not wanted:
        raise ValueError(f"--scope: give at least one of {', '.join(SCOPES)}")
    secret = _secret()
    key = ApiKey(
        id=new_id("key"),
        name=name,
        scopes=wanted,
        digest=_digest(secret),
        shown=secret[:SHOWN],
        expires_at=now() + timedelta(seconds=expires_s) if expires_s is not None else None,
        waiting_max=waiting_max,
        running_max=running_max,
    )
    session.add(key)
    session.flush()
    _on_change(session)
    audit.record(session, by, "key.create", key.id, scopes=wanted)
    return key, secret


def rotate(session: Session, by: str, key_id: str, keep_s: float = 0.0) -> tuple[ApiKey, str]:
    """A new secret for a key; the old one goes on for `keep_s`. Raises Problem."""
    key = _active(session, key_id)
    secret = _secret()
    key.previous_digest = key.digest if keep_s > 0 else None
    key.previous_until = now() + timedelta(seconds=keep_s) if keep_s > 0 else None
    key.digest, key.shown = _digest(secret), secret[:SHOWN]
    session.flush()
    _on_change(session)
    audit.record(session, by, "key.rotate", key.id, keep_s=keep_s)
    return key, secret


def revoke(session: Session, by: str, key_id: str) -> ApiKey:
    """From now on the key opens nothing; its row stays, for its jobs and the audit. Twice is no error. Raises Problem."""
    key = get(session, key_id)
    if key.revoked_at is None:
        key.revoked_at = now()
        session.flush()
        _on_change(session)
        audit.record(session, by, "key.revoke", key.id)
    return key


def get(session: Session, key_id: str) -> ApiKey:
    key = session.get(ApiKey, key_id, with_for_update=True, populate_existing=True)
    if key is None:
        raise Problem("key_not_found", "No key has this id; GET /keys lists them.")
    return key


def find(session: Session, secret: str) -> ApiKey | None:
    """The key that this secret opens now."""
    digest, instant = _digest(secret), now()
    rotated = (ApiKey.previous_digest == digest) & (ApiKey.previous_until > instant)
    lives = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > instant)
    return session.scalar(
        select(ApiKey).where(or_(ApiKey.digest == digest, rotated), ApiKey.revoked_at.is_(None), lives)
    )


def any_at_all(session: Session) -> bool:
    """Was a key ever made? From then on every caller needs one: a revoked or expired last key must not open the door to all."""
    return session.scalar(select(ApiKey.id).limit(1)) is not None


def touch(database: Database, key: ApiKey) -> None:
    """Note that a key is used, at most once a minute."""
    stale = now() - timedelta(seconds=TOUCH_S)
    if key.last_used_at is None or key.last_used_at < stale:
        with database.write() as session:
            unused = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < stale)
            session.execute(update(ApiKey).where(ApiKey.id == key.id, unused).values(last_used_at=now()))


def _active(session: Session, key_id: str) -> ApiKey:
    key = get(session, key_id)
    if key.revoked_at is not None:
        raise Problem("key_revoked", "A revoked key stays revoked; make a new one.")
    return key


def _secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _digest(secret: str) -> str:
    """A plain digest: a secret of 256 random bits cannot be guessed, so a slow hash would only cost every request its time."""
    return bytes_digest(secret.encode())
