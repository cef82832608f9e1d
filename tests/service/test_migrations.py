"""The schema's history on both databases: up, down, up again, and equal to the models."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from service import aliases, job_requests, jobs
from service.db import Database, alembic_config, now
from service.models import Adapter, AdapterVersion, Alias, Base, Job, new_id


def test_history_and_models_agree(database_url: str) -> None:
    command.check(alembic_config(database_url))


def test_down_to_nothing_and_up_again(database_url: str, database: Database) -> None:
    config = alembic_config(database_url)
    command.downgrade(config, "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    command.upgrade(config, "head")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version", *Base.metadata.tables}
    command.upgrade(config, "head")
    command.check(config)


def test_rows_live_through_every_revision(database_url: str, database: Database, dataset: Any, new_job: Any) -> None:
    """Down one revision at a time and up again with a job, its events and its bell in the tables: nothing of them is lost."""
    paused, queued = new_job(), new_job()
    with database.write() as session:
        job_requests.pause(session, paused)
        session.add_all([Adapter(name="a", last_version=1), version_of(dataset, queued)])
        session.flush()
        aliases.move(session, "local", "a", "champion", 1, "why")
    config = alembic_config(database_url)
    revisions = [r.revision for r in ScriptDirectory.from_config(config).walk_revisions()]
    assert revisions[-1] == "0001"
    for revision in revisions[1:]:
        command.downgrade(config, revision)
        with database.read() as session:
            assert session.scalar(text("SELECT count(*) FROM jobs")) == 2
            assert session.scalar(text("SELECT count(*) FROM job_events")) == 3
            assert session.scalar(text("SELECT count(*) FROM dataset_records")) == 3
            assert session.execute(text("SELECT a.version, h.reason FROM aliases a, alias_history h")).one() == (
                1,
                "why",
            )
    with database.read() as session:
        statuses = dict(session.execute(text("SELECT id, status FROM jobs")).all())
    assert statuses == {paused: "cancelled", queued: "queued"}, "the first service knows no way out of paused"
    command.upgrade(config, "head")
    command.check(config)
    with database.write() as session:
        again = jobs.get(session, queued)
        assert (again.owner, again.queued_at, again.stage_seconds) == ("local", again.created_at, {})
        assert jobs.claim(session, queued, 10, running_max=1) is not None
        assert jobs.get(session, paused).status == "cancelled"


def version_of(dataset: Any, job_id: str, number: int = 1) -> AdapterVersion:
    return AdapterVersion(
        adapter_name="a", version=number, digest="d", model="m", job_id=job_id, dataset_id=dataset.id,
        dataset_digest="d", config={}, metrics={},
    )  # fmt: skip


def job(dataset: Any, **changes: Any) -> Job:
    given = {
        "id": new_id("job"),
        "status": "queued",
        "dataset_id": dataset.id,
        "adapter_name": "a",
        "model": "m",
        "config": {},
        "meta": {},
    }
    return Job(**given | changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "unknown"},
        {"status": "running"},
        {"status": "queued", "lease_until": now()},
        {"status": "succeeded"},
        {"status": "queued", "finished_at": now()},
        {"dataset_id": "ds_none"},
    ],
)
def test_rows_that_must_never_be_are_refused(database: Database, dataset: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(job(dataset, **wrong))


def test_job_publishes_at_most_one_version_and_an_alias_points_at_a_real_one(database: Database, dataset: Any) -> None:
    with database.write() as session:
        row = job(dataset)
        session.add_all([row, Adapter(name="a", last_version=2)])
        job_id = row.id

    with database.write() as session:
        session.add(version_of(dataset, job_id))
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(version_of(dataset, job_id, 2))
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(Alias(adapter_name="a", alias="champion", version=2))


def test_sqlite_write_transactions_lock_from_their_start(tmp_path: Any) -> None:
    """Read-then-write by two writers at once: with a deferred BEGIN one of them would meet "database is locked"."""
    import threading

    database = Database(f"sqlite:///{tmp_path}/x.db")
    with database.write() as session:
        session.execute(text("CREATE TABLE n (v INTEGER)"))
        session.execute(text("INSERT INTO n VALUES (0)"))

    def bump() -> None:
        for _ in range(20):
            with database.write() as session:
                value = session.scalar(text("SELECT v FROM n"))
                session.execute(text("UPDATE n SET v = :v"), {"v": value + 1})

    threads = [threading.Thread(target=bump) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalar(text("SELECT v FROM n")) == 160
    database.close()
