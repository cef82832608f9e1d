"""Single looks round SQLAlchemy: a session's values, the known refusals, and lost connections that cost none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import bindparam, select, text
from sqlalchemy.exc import DBAPIError

from service import jobs, written
from service.db import Database
from service.look import Look
from service.models import Job
from service.routes import job_looks

_J = Job.__table__
_LOOK = Look(select(*(c for c in _J.c if c.key != "deadline_s")).where(_J.c.id == bindparam("job_id")))


def test_a_row_is_read_as_a_session_reads_it(database: Database, new_job: Callable[..., str]) -> None:
    """Texts, numbers, flags, times with their zone, JSON and its null; and a row of the same values is equal and can be a key."""
    job_id = new_job(review=True, meta={"ward": "7 – \u00fc"}, deadline_s=60.0, source=("brain", 1, "sha256:0"))
    (raw,), (again,) = (_LOOK.rows(database, job_id=job_id) for _ in range(2))
    assert {raw: 1}[again] == 1
    seen = _LOOK.read(database.engine.dialect, raw)
    with database.read() as session:
        job = session.get_one(Job, job_id)
        assert {name: getattr(job, name) for name in seen._fields} == seen._asdict()
    assert (seen.review, seen.cancel_requested, seen.promote, seen.created_at.tzinfo is None) == (
        True,
        False,
        None,
        False,
    )
    assert _LOOK.rows(database, job_id="job_0") == []


def test_what_was_written_is_taken_again_for_equal_rows_only(database: Database, new_job: Callable[..., str]) -> None:
    job_id = new_job()
    with database.write() as session:
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
    first, hits = job_looks.one(database, job_id), job_looks._text.cache_info().hits
    assert job_looks.one(database, job_id) == first
    assert job_looks._text.cache_info().hits == hits + 1
    with database.write() as session:
        jobs.heartbeat(session, mine, 60, stage="generating")
    assert '"stage":"generating"' in job_looks.one(database, job_id)


def test_lost_connections_cost_no_answer(database: Database, new_job: Callable[..., str]) -> None:
    if database.engine.dialect.name != "postgresql":
        pytest.skip("a file has no connections to lose")
    job_id = new_job()
    with database.looker(), database.looker():  # two are opened, and both lost
        _LOOK.rows(database, job_id=job_id)
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with database.read() as session:
        session.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
    for _ in range(3):
        assert len(_LOOK.rows(database, job_id=job_id)) == 1


def test_refusals_are_those_that_the_api_knows(
    client: TestClient, database: Database, new_job: Callable[..., str]
) -> None:
    """A NUL is stored by no PostgreSQL; a database without its tables is away, and the driver's words stay inside."""
    with_nul: Any = client.get("/jobs/a%00b")
    assert with_nul.json()["code"] == (
        "invalid_request" if database.engine.dialect.name == "postgresql" else "job_not_found"
    )
    with pytest.raises(DBAPIError) as caught:
        Look(select(text("secret_column")).select_from(text("nowhere"))).rows(database)
    assert type(caught.value).__name__ in ("OperationalError", "ProgrammingError")


def test_what_was_written_is_kept_for_a_while_and_within_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caller deletes is not remembered for longer; texts of any length take so much and no more."""
    monkeypatch.setattr(written, "KEPT_S", 0.2)
    made: list[int] = []

    @written.kept(10_000)
    def text_of(number: int, length: int) -> str:
        made.append(number)
        return "x" * length

    assert [len(text_of(1, 9)), len(text_of(1, 9))] == [9, 9]
    for number in range(2, 6):
        text_of(number, 2000)  # of which two fit
    text_of(5, 2000)
    text_of(2, 2000)
    assert made == [1, 2, 3, 4, 5, 2]
    time.sleep(0.25)
    text_of(2, 2000)
    assert made[-2:] == [2, 2]
    assert len(text_of(9, 20_000)) == 20_000  # too long to be kept
