"""Idempotency-Key: the same request sent twice makes one job. The key is stored in the transaction that makes the job.

A second request that arrives while the first is still at work is told so (409) rather than kept waiting: within this process by a set,
between replicas by a lock of PostgreSQL's that ends with its transaction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from hscr.artifacts import bytes_digest, json_digest
from service.db import Database
from service.errors import Problem
from service.models import IdempotencyKey


class InFlight:
    """The keys that this process is working on."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        with self._lock:
            if key in self._keys:
                raise _in_flight()
            self._keys.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._keys.discard(key)


def once(
    database: Database,
    in_flight: InFlight,
    key: str | None,
    body: dict[str, Any],
    make: Callable[[Session], tuple[str, dict[str, Any]]],
) -> tuple[dict[str, Any], bool]:
    """Run `make` (job id, response) in a write transaction, or replay what it answered before; the response and whether it is a replay."""
    if key is None:
        with database.write() as session:
            return make(session)[1], False
    key_digest = bytes_digest(key.encode())
    body_digest = json_digest(body)
    with in_flight.hold(key_digest), database.write() as session:
        if session.get_bind().dialect.name == "postgresql":
            number = int(key_digest[7:22], 16)
            if not session.scalar(text("SELECT pg_try_advisory_xact_lock(:n)"), {"n": number}):
                raise _in_flight()
        known = session.get(IdempotencyKey, key_digest)
        if known is None:
            job_id, response = make(session)
            session.add(
                IdempotencyKey(key_digest=key_digest, body_digest=body_digest, job_id=job_id, response=response)
            )
            return response, False
        if known.body_digest != body_digest:
            raise Problem("idempotency_mismatch", "Use a new Idempotency-Key for a new request.")
        return known.response, True


def _in_flight() -> Problem:
    return Problem("idempotency_in_flight", "Send the request again in a moment.", headers={"Retry-After": "1"})
