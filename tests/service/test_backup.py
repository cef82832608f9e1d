"""Backup of a service that works, and restore: what was there is there again and goes on, and nothing half is ever taken for whole."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from typer.testing import CliRunner

from hscr.artifacts import verify_manifest, write_manifest
from service import adapters, jobs
from service.app import create_app
from service.backup import backup, restore
from service.cli import app as cli
from service.db import Database, now
from service.models import AuditEntry, Job
from service.settings import Settings
from tests.conftest import dataset_zip, wait_for
from tests.service.test_registry import publish
from tests.service.test_reviews import waiting
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

__all__ = ["publish", "waiting"]  # fixtures


@pytest.fixture
def elsewhere(settings: Settings, database_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Settings of another, empty place of the same kind of database."""
    on_postgres = database_url.startswith("postgres")
    url = request.getfixturevalue("postgres")() if on_postgres else f"sqlite:///{tmp_path / 'new' / 'hscr.db'}"
    return settings.model_copy(update={"data_dir": tmp_path / "new", "database_url": url})


def test_service_is_backed_up_while_it_works_and_goes_on_elsewhere(
    client: TestClient,
    database: Database,
    settings: Settings,
    elsewhere: Settings,
    publish: Callable[..., str],
    new_job: Callable[..., str],
    waiting: str,
    stand_in: Callable[..., None],
    tmp_path: Path,
) -> None:
    """A version with an alias, a job that awaits review with a correction, one that runs all the while, and uploads that keep coming."""
    done = publish()
    client.put("/adapters/brain/aliases/champion", json={"version": 1, "reason": "first"})
    client.patch(f"/jobs/{waiting}/preferences/1", json={"rejected": True})
    gate = tmp_path / "gate"
    gate.write_text("optimizing")
    stand_in(hold=str(gate))
    running = new_job()
    worker = threading.Thread(target=run_job, args=(database, settings, running, lambda: False))
    stop = threading.Event()

    def uploads() -> None:
        n = 4
        while not stop.is_set():
            client.post("/datasets", files={"file": ("x.zip", dataset_zip(n))}, data={"name": "more"})
            n += 1

    uploader = threading.Thread(target=uploads)
    worker.start()
    uploader.start()
    try:
        wait_for(lambda: gate.with_suffix(".here").is_file(), what="the run holds")
        wait_for(lambda: len(client.get("/datasets").json()["data"]) > 2)
        report = backup(settings, tmp_path / "saved")
    finally:
        stop.set()
        gate.unlink()
        uploader.join()
        worker.join()
    assert (report.damaged, report.busy) == ([], [running])
    verify_manifest(tmp_path / "saved")
    assert restore(elsewhere, tmp_path / "saved").audit == report.audit

    other = Database(elsewhere.database)
    with TestClient(create_app(elsewhere), base_url="http://127.0.0.1") as restored:
        assert restored.get("/adapters/brain/versions/1").json() == client.get("/adapters/brain/versions/1").json()
        assert restored.get("/adapters/brain").json()["aliases"][0]["version"] == 1
        archive = zipfile.ZipFile(io.BytesIO(restored.get("/adapters/brain/versions/1/download").content))
        assert archive.testzip() is None
        assert restored.get(f"/jobs/{done}/report").text == "<h1>report</h1>"
        assert restored.get(f"/jobs/{waiting}/preferences").json()["data"][0]["rejected"]
        named = restored.get("/datasets", params={"limit": 200}).json()["data"]
        assert len(named) == report.counts["datasets"]
        for row in named:
            got = restored.get(f"/datasets/{row['id']}/records/1/image")
            assert got.status_code == 200, "each row of the copy has its files"
        events = restored.get(f"/jobs/{waiting}/events").json()["data"]
        restored.post(f"/jobs/{waiting}/approve")
        more = restored.get(f"/jobs/{waiting}/events").json()["data"]
        assert [e["seq"] for e in more] == list(range(1, len(events) + 2)), "counters go on after what was restored"
        stand_in()
        run_job(other, elsewhere, waiting, lambda: False)
        assert restored.get(f"/jobs/{waiting}").json()["status"] == "succeeded"
        # The job that ran has lost its supervisor: its lease ends, and it runs again from its beginning.
        assert restored.get(f"/jobs/{running}").json()["status"] == "running"
        with other.write() as session:
            session.execute(update(Job).where(Job.id == running).values(lease_until=now()))
        with other.write() as session:
            assert jobs.reap(session, running, 3) == "queued"
        run_job(other, elsewhere, running, lambda: False)
        assert restored.get(f"/jobs/{running}").json()["status"] == "succeeded"
        assert restored.get("/adapters/brain").json()["last_version"] == 3
        assert restored.post("/datasets", files={"file": ("x.zip", dataset_zip(2))}).status_code == 201
    other.close()


def test_failed_jobs_checkpoints_come_along(
    client: TestClient,
    database: Database,
    settings: Settings,
    elsewhere: Settings,
    new_job: Callable[..., str],
    stand_in: Callable[..., None],
    tmp_path: Path,
) -> None:
    stand_in(crash_at=4)
    settings.max_crashes = 1
    job_id = new_job()
    run_job(database, settings, job_id, lambda: False)
    backup(settings, tmp_path / "saved")
    restore(elsewhere, tmp_path / "saved")
    stand_in()
    other = Database(elsewhere.database)
    with TestClient(create_app(elsewhere), base_url="http://127.0.0.1") as restored:
        restored.post(f"/jobs/{job_id}/retry")
        run_job(other, elsewhere, job_id, lambda: False)
        rows = restored.get(f"/jobs/{job_id}/events").json()["data"]
        assert [e["data"]["step"] for e in rows if e["type"] == "metrics"] == [1, 2, 3, 4, 5], "no step was taken twice"
    other.close()


def test_backup_that_was_changed_is_not_restored(
    settings: Settings, elsewhere: Settings, publish: Callable[..., str], tmp_path: Path
) -> None:
    publish()
    backup(settings, tmp_path / "saved")
    weights = next((tmp_path / "saved").rglob("adapter_model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="files differ"):
        restore(elsewhere, tmp_path / "saved")
    weights.write_bytes(whole)
    about = tmp_path / "saved" / "backup.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    write_manifest(tmp_path / "saved")
    with pytest.raises(ValueError, match="another form"):
        restore(elsewhere, tmp_path / "saved")
    with pytest.raises(ValueError, match="is no backup"):
        restore(elsewhere, tmp_path)
    assert not (elsewhere.data_dir / "artifacts").exists()


def test_audit_that_was_cut_is_found_by_the_restore(
    client: TestClient,
    database: Database,
    settings: Settings,
    elsewhere: Settings,
    publish: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The end of the chain stands in the backup: a database of an earlier time beside a later note is not taken for it."""
    publish()
    backup(settings, tmp_path / "saved")
    about = tmp_path / "saved" / "backup.json"
    written = json.loads(about.read_text())
    number, _, digest = written["audit"].partition(":")
    about.write_text(json.dumps(written | {"audit": f"{int(number) + 1}:{digest}"}))
    write_manifest(tmp_path / "saved")
    with pytest.raises(ValueError, match="the audit does not hold"):
        restore(elsewhere, tmp_path / "saved")


def test_nothing_is_restored_over_what_is_there(
    settings: Settings, elsewhere: Settings, publish: Callable[..., str], database: Database, tmp_path: Path
) -> None:
    publish()
    backup(settings, tmp_path / "saved")
    with pytest.raises(ValueError, match="exists already"):
        backup(settings, tmp_path / "saved")
    with pytest.raises(ValueError, match="the data folder has"):
        restore(settings, tmp_path / "saved")
    with pytest.raises(ValueError, match="holds rows already"):
        restore(settings.model_copy(update={"data_dir": tmp_path / "empty"}), tmp_path / "saved")
    with database.read() as session:
        assert session.scalars(select(AuditEntry)).first() is not None
    assert not (tmp_path / "empty" / "artifacts").exists()


def test_damaged_artifacts_are_told_and_the_rest_is_saved(
    client: TestClient, settings: Settings, publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(5)
    publish(6)
    first, second = (client.get(f"/adapters/brain/versions/{n}").json()["digest"] for n in (1, 2))
    shutil.rmtree(adapters.folder(settings.data_dir, first))
    (adapters.folder(settings.data_dir, second) / "adapter_model.safetensors").write_bytes(b"other")
    monkeypatch.setenv("DATABASE_URL", settings.database)
    made = CliRunner().invoke(cli, ["backup", "--out", str(tmp_path / "saved"), "--data", str(settings.data_dir)])
    assert made.exit_code == 1
    assert "1 datasets, 2 jobs, 2 adapter versions, 3 audit" in made.stdout
    assert first in made.stderr
    assert second in made.stderr
    assert set(json.loads((tmp_path / "saved" / "backup.json").read_text())["damaged"]) == {first, second}


def test_command_line_brings_it_back(
    settings: Settings,
    elsewhere: Settings,
    publish: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()
    monkeypatch.setenv("DATABASE_URL", settings.database)
    run = CliRunner()
    saved, data = str(tmp_path / "saved"), str(settings.data_dir)
    assert run.invoke(cli, ["backup", "-o", saved, "--data", data]).exit_code == 0
    monkeypatch.setenv("DATABASE_URL", elsewhere.database)
    back = run.invoke(cli, ["restore", saved, "--data", str(elsewhere.data_dir)])
    assert back.exit_code == 0, back.output
    assert "1 adapter versions" in back.stdout
    again = run.invoke(cli, ["restore", saved, "--data", str(elsewhere.data_dir)])
    assert isinstance(again.exception, ValueError)
    assert not list(tmp_path.glob(".saved*"))


def test_there_is_nothing_to_back_up(settings: Settings, tmp_path: Path, database_url: str) -> None:
    away = settings.model_copy(update={"data_dir": tmp_path / "none"})
    with pytest.raises(ValueError, match="nothing to back up"):
        backup(away, tmp_path / "saved")
    settings.data_dir.mkdir(exist_ok=True)
    old = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'old.db'}"})
    Database(old.database).engine.connect().close()
    with pytest.raises(ValueError, match="has no schema"):
        backup(old, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not list(tmp_path.glob(".saved*"))


def test_nothing_is_collected_while_it_is_copied(
    database: Database, settings: Settings, publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import backup as module
    from service.retention import collect

    publish()
    orphan = adapters.folder(settings.data_dir, "sha256:orphan")
    orphan.mkdir()
    copy, seen = module._copy_artifacts, []

    def meanwhile(*arguments: object) -> list[str]:
        seen.append(collect(database, settings.data_dir))
        return copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy_artifacts", meanwhile)
    backup(settings, tmp_path / "saved")
    assert (seen, orphan.is_dir()) == ([0], True)
    assert collect(database, settings.data_dir) == 1


def test_folder_that_a_process_holds_is_left_out_and_told(settings: Settings, waiting: str, tmp_path: Path) -> None:
    folder = settings.data_dir / "runs" / waiting
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert backup(settings, tmp_path / "saved").busy == [waiting]
    assert not (tmp_path / "saved" / "data" / "runs" / waiting).exists()
    assert backup(settings, tmp_path / "again").busy == []
    assert (tmp_path / "again" / "data" / "runs" / waiting / "attempt-1" / "preferences.jsonl").is_file()
