"""From every revision to the newest and back, on both databases, with rows in every table: nothing is lost that the older schema knows.

Rows are written by the tables as they are at a revision, not by today's models, which know more.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, MetaData, Table, insert, select

from service import aliases, evaluations, jobs
from service.db import Database, alembic_config, now
from service.models import Adapter, AdapterVersion, Base, Evaluation, Job, PreferenceEdit, VersionTag

REVISIONS = sorted(
    path.name.split("_")[0] for path in (Path(__file__).parents[2] / "migrations" / "versions").glob("0*.py")
)
AT = datetime(2026, 5, 12, 10, 30, tzinfo=UTC)
ENDED = {"finished_at": AT, "started_at": AT, "report": "sha256-r", "error_code": None}
JOB = {
    "stage": "optimizing", "cancel_requested": True, "dataset_id": "ds_1", "evaluation_dataset_id": "ds_1",
    "adapter_name": "brain", "model": "m", "config": {"a": [1, "é"]}, "meta": {"k": "v"}, "fence": 3, "attempts": 2,
    "crashes": 1, "high_water": 2**40, "crash_water": 5, "last_seq": 4, "progress": {"done": 1}, "metrics": {"x": 0.5},
    "created_at": AT, "owner": "key_1", "review": True, "approved_at": AT, "queued_at": AT, "pause_requested": True,
    "stage_seconds": {"generating": 1.5}, "deadline_s": 9.5, "webhook": "https://h", "promote": {"alias": "champion"}, "kind": "align",
    "source_name": "brain", "source_version": 1, "source_digest": "sha256:s",
}  # fmt: skip
VERSION = {
    "adapter_name": "brain", "digest": "sha256:a", "model": "m", "dataset_id": "ds_1", "dataset_digest": "sha256:d",
    "config": {"c": 1}, "metrics": {"m": 1.5}, "created_at": AT, "preferences_digest": "sha256:p", "notes": "n",
    "review": {"levels_rejected": 1}, "source": "job",
}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "datasets": [
        {"id": "ds_1", "name": "n", "version": 1, "format": "hscr", "digest": "sha256:d", "files_digest": "sha256:f",
         "n_records": 1, "n_images": 1, "n_rejected": 1, "rejected": [{"line": 2}], "created_at": AT,
         "n_bytes": 2**40, "pictures": {"cleaned": 1}, "repeats": {"duplicates": {"questions": 1}}},
    ],
    "dataset_records": [{"dataset_id": "ds_1", "number": 1, "record_id": "r", "record": {"q": "ü"}}],
    "jobs": [
        JOB | {"id": "job_1", "status": "queued"},
        JOB | {"id": "job_2", "status": "succeeded"} | ENDED,
        JOB | {"id": "job_3", "status": "running", "lease_until": AT},
        JOB | {"id": "job_4", "status": "failed", "error_message": "why"} | ENDED | {"error_code": "bad"},
    ],
    "job_events": [
        {"job_id": "job_1", "seq": n, "fence": 1, "type": "status", "data": {"n": n}, "created_at": AT} for n in (1, 2)
    ],
    "outbox": [{"job_id": "job_1", "created_at": AT}],
    "idempotency_keys": [
        {"key_digest": "k", "body_digest": "b", "job_id": "job_1", "response": {"id": "job_1"}, "created_at": AT}
    ],
    "adapters": [{"name": "brain", "last_version": 2, "created_at": AT}],
    "adapter_versions": [VERSION | {"version": 1, "job_id": "job_2"}, VERSION | {"version": 2, "job_id": "job_4"}],
    "aliases": [{"adapter_name": "brain", "alias": "champion", "version": 2, "updated_at": AT}],
    "alias_history": [
        {"adapter_name": "brain", "alias": "champion", "from_version": 1, "to_version": 2, "reason": "why",
         "actor": "key_1", "rollback": False, "created_at": AT, "gate_job_id": "job_2"},
    ],
    "api_keys": [
        {"id": "key_1", "name": "k", "shown": "hscr_ab", "digest": "d", "scopes": ["vqa"], "created_at": AT, "waiting_max": 3}
    ],
    "audit": [
        {"number": 1, "at": AT, "actor": "local", "action": "a", "subject": "s", "data": {"x": 1}, "previous": "p", "digest": "d"}
    ],
    "audit_head": [],  # its one row comes with the table
    "version_tags": [{"adapter_name": "brain", "version": 2, "tag": "ct"}],
    "webhook_deliveries": [
        {"id": "wd_1", "job_id": "job_2", "seq": 4, "event": "job.succeeded", "url": "https://h", "status": "pending",
         "attempts": 1, "tries": 1, "next_at": AT, "log": [{"status": 500}], "created_at": AT},
    ],
    "preference_edits": [
        {"job_id": "job_2", "number": 1, "line": "sha256:l", "rejected": True, "levels": {"1": {"text": "x"}},
         "actor": "local", "updated_at": AT},
    ],
    "generation_shards": [
        {"job_id": "job_3", "number": 2, "parts": 3, "start": 4, "stop": 8, "status": "running", "fence": 2, "lease_until": AT,
         "crashes": 1, "created_at": AT},
    ],
    "evaluations": [
        {"job_id": "job_4", "adapter_name": "brain", "version": 1, "digest": "sha256:a", "before_version": 2,
         "dataset_id": "ds_1", "dataset_digest": "sha256:d", "result_digest": "sha256:e", "metrics": {"m": 1.0}, "created_at": AT},
    ],
    "gates": [
        {"job_id": "job_4", "adapter_name": "brain", "alias": "champion", "candidate": 2, "champion": 1,
         "dataset_id": "ds_1", "rule": {"metric": "m"}, "decision": "moved", "interval": {"low": 0.1}, "finding": "f",
         "reason": "r", "actor": "local", "created_at": AT, "decided_at": AT},
    ],
}  # fmt: skip


def tables_of(database: Database) -> list[Table]:
    metadata = MetaData()
    metadata.reflect(database.engine)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def fill(database: Database) -> None:
    for table in tables_of(database):
        assert table.name in ROWS, f"{table.name}: give it a row here"
        with database.write() as session:
            for row in ROWS[table.name]:
                session.execute(insert(table).values({k: v for k, v in row.items() if k in table.columns}))


def content(database: Database, tables: list[Table]) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of the columns that the given (older) tables know."""
    with database.read() as session:
        return {
            table.name: sorted((tuple(row) for row in session.execute(select(*table.columns))), key=repr)
            for table in tables
        }


def test_every_revision_is_here_and_every_table_has_rows(database: Database) -> None:
    assert [f"{n:04}" for n in range(1, len(REVISIONS) + 1)] == REVISIONS
    assert set(ROWS) == set(Base.metadata.tables)
    script = ScriptDirectory.from_config(alembic_config("sqlite://"))
    assert [r.revision for r in script.walk_revisions()][::-1] == REVISIONS
    for table in tables_of(database):  # a column that no row fills would be carried along unseen
        unfilled = {c.name for c in table.columns} - {k for row in ROWS[table.name] for k in row}
        assert unfilled <= {"id", "rung_at", "deadline_at", "deleted_at", "files_removed_at", "previous_digest",
                            "previous_until", "running_max", "expires_at", "revoked_at", "last_used_at", "delivered_at",
                            "number", "digest"}, table.name  # fmt: skip


@pytest.mark.either_database
@pytest.mark.parametrize("revision", REVISIONS)
def test_rows_of_a_revision_live_through_the_way_up_and_back(
    database_url: str, database: Database, revision: str
) -> None:
    config = alembic_config(database_url)
    command.downgrade(config, "base")
    command.upgrade(config, revision)
    fill(database)
    older = tables_of(database)
    before = content(database, older)
    assert all(before.values()), "each table has rows"
    command.upgrade(config, "head")
    assert content(database, older) == before
    command.check(config)
    with database.read() as session:
        for mapper in Base.registry.mappers:  # today's program reads what an older one wrote
            assert session.scalars(select(mapper.class_)).all() or mapper.local_table.name not in before
        assert jobs.get(session, "job_1").kind == "align"
    command.downgrade(config, revision)
    assert content(database, tables_of(database)) == before
    command.upgrade(config, "head")
    assert content(database, older) == before
    with database.write() as session:
        assert jobs.claim(session, "job_1", 10) is not None


def test_json_columns_are_json_on_both_ways(database: Database) -> None:
    """Reflection must see them as JSON, or the comparisons above would be of texts."""
    jobs_table = next(table for table in tables_of(database) if table.name == "jobs")
    assert isinstance(jobs_table.columns["config"].type, JSON)


def test_what_an_older_service_cannot_know_is_given_up_on_the_way_down(
    database_url: str, database: Database, dataset: Any, new_job: Any
) -> None:
    """An uploaded version with what points at it, an evaluation in the queue, and corrections that an older run would not see."""
    made, edited, plain = new_job(), new_job(review=True), new_job()
    config = alembic_config(database_url)
    with database.write() as session:
        session.add(Adapter(name="a", last_version=2))
        session.flush()
        for number, source, job_id in ((1, "job", made), (2, "upload", None)):
            given = {"dataset_id": dataset.id, "dataset_digest": dataset.digest} if job_id else {}
            session.add(
                AdapterVersion(
                    adapter_name="a", version=number, source=source, job_id=job_id, digest=f"d{number}", model="hscr-demo",
                    config={}, metrics={}, **given,
                )
            )  # fmt: skip
            session.flush()
            session.add(VersionTag(adapter_name="a", version=number, tag="t"))
            aliases.move(session, "local", "a", f"at{number}", number, None)
        version = session.get_one(AdapterVersion, ("a", 2))
        values = {"evaluation": {"allow_leak": True}}
        evaluation = evaluations.ask(session, version, dataset.id, values, owner="local").id
        session.add(
            Evaluation(
                job_id=made, adapter_name="a", version=2, digest="d2", dataset_id=dataset.id, dataset_digest="d",
                result_digest="r", metrics={},
            )
        )  # fmt: skip
        mine = jobs.claim(session, edited, 60)
        assert mine is not None
        jobs.await_review(session, mine)
        session.add(PreferenceEdit(job_id=edited, number=1, line="l", rejected=True, levels={}, actor="local"))

    def column(query: Any) -> list[Any]:
        with database.read() as session:
            return sorted(session.scalars(query))

    def status(job_id: str) -> str:
        return column(select(Base.metadata.tables["jobs"].c.status).where(Job.id == job_id))[0]

    command.downgrade(config, "0009")
    tables = {table.name: table for table in tables_of(database)}
    assert column(select(tables["adapter_versions"].c.version)) == [1]
    assert column(select(tables["aliases"].c.alias)) == ["at1"]
    assert column(select(tables["version_tags"].c.version)) == [1]
    assert column(select(tables["evaluations"].c.version)) == []
    assert (status(evaluation), status(edited)) == ("queued", "awaiting_review")
    command.downgrade(config, "0007")
    assert (status(evaluation), status(edited)) == ("cancelled", "awaiting_review")
    command.downgrade(config, "0006")
    assert (status(edited), status(plain)) == ("cancelled", "queued")
    command.upgrade(config, "head")
    with database.read() as session:
        assert session.get_one(AdapterVersion, ("a", 1)).source == "job"
        assert jobs.get(session, edited).finished_at <= now()
