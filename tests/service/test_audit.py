"""The audit: every change by a caller is in it, reads are not, nobody can change it, and whoever could is found out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from service import audit
from service.cli import app as cli
from service.db import Database
from service.models import AuditEntry
from service.settings import Settings
from tests.conftest import dataset_zip


def entries(database: Database) -> list[AuditEntry]:
    with database.read() as session:
        return list(session.scalars(select(AuditEntry).order_by(AuditEntry.number)))


def fill(database: Database, n: int = 5) -> None:
    for i in range(n):
        with database.write() as session:
            audit.record(session, "key_1", "job.cancel", f"job_{i}", n=i)


def findings(database: Database, expect: tuple[int, str] | None = None) -> list[str]:
    with database.read() as session:
        return audit.verify(session, expect).findings


def tamper(database: Database, *statements: str) -> None:
    """As somebody with the database's password would: first the triggers go."""
    with database.write() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("DROP TRIGGER audit_append_only ON audit"))
        else:
            for verb in ("update", "delete"):
                session.execute(text(f"DROP TRIGGER audit_no_{verb}"))
        for statement in statements:
            session.execute(text(statement))


def test_every_change_is_noted_once_and_no_read_is(client: TestClient, database: Database) -> None:
    dataset = client.post("/datasets", files={"file": ("x.zip", dataset_zip())}).json()["id"]
    client.post("/datasets", files={"file": ("x.zip", dataset_zip())})
    headers = {"Idempotency-Key": "k"}
    body = {"dataset": dataset, "adapter": "brain", "metadata": {"note": "canary"}}
    job = client.post("/align", json=body, headers=headers).json()["id"]
    client.post("/align", json=body, headers=headers)
    client.post("/align", json=body | {"dataset": "ds_none"})
    for verb in ("pause", "pause", "resume", "approve", "cancel", "cancel", "retry"):
        client.post(f"/jobs/{job}/{verb}")
    client.delete(f"/jobs/{job}")
    client.delete(f"/jobs/{job}")
    for path in ("/jobs", f"/jobs/{job}", f"/jobs/{job}/events", "/datasets", "/adapters", "/audit", "/keys"):
        client.get(path)
    told = [(e.actor, e.action, e.subject) for e in entries(database)]
    assert told == [
        ("local", "dataset.create", dataset),
        ("local", "job.create", job),
        ("local", "job.pause", job),
        ("local", "job.resume", job),
        ("local", "job.cancel", job),
        ("local", "job.delete", job),
    ]
    page = client.get("/audit", params={"subject": job, "limit": 2}).json()
    assert [e["action"] for e in page["data"]] == ["job.create", "job.pause"]
    assert page["has_more"]
    assert "canary" not in client.get("/audit").text
    assert findings(database) == []


def test_change_that_is_rolled_back_leaves_no_entry(database: Database) -> None:
    fill(database, 2)
    with database.write() as session:
        audit.record(session, "a", "b", "c")
        session.rollback()
    fill(database, 1)
    assert [e.number for e in entries(database)] == [1, 2, 3]
    assert findings(database) == []


def test_writers_at_once_make_one_chain(database: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: fill(database, 5), range(8)))
    assert [e.number for e in entries(database)] == list(range(1, 41))
    assert findings(database) == []


@pytest.mark.parametrize(
    "statement",
    ["UPDATE audit SET actor = 'other' WHERE number = 2", "DELETE FROM audit WHERE number = 2", "DELETE FROM audit"],
)
def test_database_refuses_to_change_or_remove_an_entry(database: Database, statement: str) -> None:
    fill(database)
    with pytest.raises(DBAPIError, match="append-only"), database.write() as session:
        session.execute(text(statement))
    assert len(entries(database)) == 5


def test_truncate_is_refused_too(database: Database) -> None:
    fill(database)
    if database.engine.dialect.name == "postgresql":
        with pytest.raises(DBAPIError, match="append-only"), database.write() as session:
            session.execute(text("TRUNCATE audit"))
    assert len(entries(database)) == 5


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE audit SET actor = 'other' WHERE number = 3", "entry 3 was changed"),
        ("UPDATE audit SET data = '{\"n\": 9}' WHERE number = 3", "entry 3 was changed"),
        ("UPDATE audit SET at = '2020-01-01 00:00:00+00:00' WHERE number = 3", "entry 3 was changed"),
        ("UPDATE audit SET digest = 'sha256:0' WHERE number = 3", "entry 3 was changed"),
        ("DELETE FROM audit WHERE number = 3", "entries 3 to 3 are missing"),
        ("DELETE FROM audit WHERE number = 1", "entries 1 to 1 are missing"),
        ("DELETE FROM audit WHERE number = 5", "the chain ends with entry 4, but its head says 5"),
        ("DELETE FROM audit", "the chain ends with entry 0, but its head says 5"),
        ("UPDATE audit_head SET number = 4", "the chain ends with entry 5, but its head says 4"),
        ("DELETE FROM audit_head", "the chain ends with entry 5, but its head says nothing"),
    ],
)
def test_tampering_is_found(database: Database, statement: str, finding: str) -> None:
    fill(database)
    assert findings(database) == []
    tamper(database, statement)
    assert finding in findings(database)


def test_entry_rewritten_with_its_own_digest_breaks_the_next_one(database: Database) -> None:
    """A careful hand recomputes the changed row's digest: then the following row does not follow any more."""
    fill(database)
    third = entries(database)[2]
    third.actor = "other"
    digest = audit._digest(third)
    tamper(database, f"UPDATE audit SET actor = 'other', digest = '{digest}' WHERE number = 3")
    assert findings(database) == ["entry 4 does not follow from entry 3"]


def test_cut_off_end_with_its_head_set_back_is_found_by_what_was_noted(database: Database) -> None:
    fill(database)
    rows = entries(database)
    noted = (5, rows[4].digest)
    tamper(
        database,
        "DELETE FROM audit WHERE number > 3",
        f"UPDATE audit_head SET number = 3, digest = '{rows[2].digest}'",
    )
    assert findings(database) == []
    assert findings(database, noted) == ["entry 5, which was noted, is missing"]
    fill(database, 2)
    assert findings(database, noted) == ["entry 5 is not the one that was noted"]


def test_command_line_says_whole_or_what_is_wrong(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database)
    fill(database)

    def verify(*words: str) -> Any:
        return CliRunner().invoke(cli, ["audit", "verify", *words])

    whole = verify()
    assert whole.exit_code == 0, whole.output
    assert whole.stdout.startswith("5 entries; the last is 5:sha256:")
    noted = whole.stdout.split()[-1]
    assert verify("--expect", noted).exit_code == 0
    tamper(database, "DELETE FROM audit WHERE number = 2")
    broken = verify()
    assert broken.exit_code == 1
    assert "entries 2 to 2 are missing" in broken.output
