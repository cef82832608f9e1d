"""What is not kept for ever: deleted jobs, folders of ended runs, idempotency keys, artifacts without a row. And what must be kept."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from service import adapters, job_requests, jobs, retention, run_folders
from service.db import Database, now
from service.errors import Problem
from service.models import AdapterVersion, IdempotencyKey, Job, JobEvent
from service.settings import Settings
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

Tell = Callable[..., None]
NewJob = Callable[..., str]


@pytest.fixture
def work(database: Database, settings: Settings, new_job: NewJob, stand_in: Tell) -> Callable[..., str]:
    """Run a job of the stand-in; its id."""

    def make(job_id: str | None = None, **told: Any) -> str:
        stand_in(**told)
        job_id = job_id or new_job()
        run_job(database, settings, job_id, lambda: False)
        return job_id

    return make


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return jobs.get(session, job_id)


def age(database: Database, job_id: str, days: float) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(finished_at=now() - timedelta(days=days)))


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*")}


def test_deleted_job_leaves_its_version_and_nothing_on_disk(
    client: TestClient, database: Database, settings: Settings, dataset: Any, work: Callable[..., str]
) -> None:
    body = {"dataset": dataset.id, "adapter": "brain", "metadata": {"note": "canary"}}
    job_id = client.post("/align", json=body, headers={"Idempotency-Key": "k"}).json()["id"]
    work(job_id)
    version = client.get("/adapters/brain/versions/1").json()
    report = settings.data_dir / "artifacts" / "reports" / (job_of(database, job_id).report or "")
    assert report.is_dir()
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert not run_folders.folder(settings.data_dir, job_id).exists()
    assert not report.exists()
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["metadata"], job["report_url"]) == ("succeeded", {}, None)
    assert job["deleted_at"] is not None
    assert "canary" not in client.get(f"/jobs/{job_id}").text
    assert client.get("/jobs").json()["data"] == []
    assert client.get(f"/jobs/{job_id}/events").json()["data"] == []
    assert client.get(f"/jobs/{job_id}/report").json()["code"] == "report_not_found"
    assert client.get("/adapters/brain/versions/1").json() == version
    assert client.get("/adapters/brain/versions/1/download").status_code == 200
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JobEvent)) == 0
        assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 0
    assert client.delete(f"/jobs/{job_id}").status_code == 204, "twice is no error"
    with client.stream("GET", f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as stream:
        assert "data:" not in "".join(stream.iter_text())


def test_only_ended_jobs_are_deleted_and_a_deleted_one_stays_so(
    client: TestClient, database: Database, settings: Settings, new_job: NewJob, work: Callable[..., str]
) -> None:
    job_id = new_job()
    for status in ("queued", "paused", "queued", "running"):
        if status == "paused":
            client.post(f"/jobs/{job_id}/pause")
        elif status == "running":
            client.post(f"/jobs/{job_id}/resume")
            with database.write() as session:
                mine = jobs.claim(session, job_id, 60)
        answer = client.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["code"]) == (409, "job_not_ended")
    assert mine is not None
    with database.write() as session:
        jobs.fail(session, mine, "x", "x")
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert client.post(f"/jobs/{job_id}/retry").json()["code"] == "job_deleted"
    with database.write() as session:
        assert jobs.move(session, job_id, "queued") is None
    assert client.delete("/jobs/job_none").json()["code"] == "job_not_found"


def test_report_that_two_jobs_share_stays_with_the_other(
    client: TestClient, database: Database, settings: Settings, work: Callable[..., str]
) -> None:
    first, second = work(), work()
    assert job_of(database, first).report == job_of(database, second).report
    client.delete(f"/jobs/{first}")
    assert client.get(f"/jobs/{second}/report").status_code == 200


def test_ended_job_keeps_what_people_look_at_and_a_failed_one_its_checkpoint(
    database: Database, settings: Settings, work: Callable[..., str]
) -> None:
    settings.max_crashes = 1
    done, failed = work(), work(crash_at=3)
    folder = run_folders.folder(settings.data_dir, done)
    (attempt,) = folder.glob("attempt-*")
    assert {"preferences.jsonl", "report.json"} <= files(attempt)
    assert not [p for p in attempt.iterdir() if p.is_dir()], "no checkpoints, no second copy of the adapter"
    assert job_of(database, failed).status == "failed"
    (attempt,) = run_folders.folder(settings.data_dir, failed).glob("attempt-*")
    assert "state.json" in files(attempt)


def test_folders_of_ended_jobs_go_after_their_time_and_no_others(
    database: Database, settings: Settings, new_job: NewJob, work: Callable[..., str]
) -> None:
    settings.max_crashes, settings.keep_runs_s = 1, 86400.0
    old, young, failed = work(), work(), work(crash_at=3)
    age(database, old, 2)
    age(database, failed, 2)
    paused = new_job()
    (run_folders.folder(settings.data_dir, paused) / "attempt-1").mkdir(parents=True)
    with database.write() as session:
        job_requests.pause(session, paused)
    assert retention.clean(database, settings) == 2
    left = {p.name for p in (settings.data_dir / "runs").iterdir()}
    assert left == {young, paused}
    assert job_of(database, old).files_removed_at is not None
    assert retention.clean(database, settings) == 0
    settings.keep_runs_s = None
    age(database, young, 1000)
    assert retention.clean(database, settings) == 0
    with database.write() as session:
        job_requests.retry(session, failed, None)
    work(failed)
    assert job_of(database, failed).status == "succeeded", "without its checkpoint it begins again"
    assert job_of(database, failed).files_removed_at is None


def test_folder_under_a_living_run_is_left_until_it_is_dead(
    database: Database, settings: Settings, client: TestClient, work: Callable[..., str]
) -> None:
    job_id = work()
    folder = run_folders.folder(settings.data_dir, job_id)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert client.delete(f"/jobs/{job_id}").status_code == 204
        assert folder.is_dir()
        assert not retention.free(database, settings.data_dir, job_id)
    assert retention.clean(database, settings) >= 1
    assert not folder.exists()


def test_folder_of_a_job_that_was_retried_meanwhile_is_kept(
    database: Database, settings: Settings, work: Callable[..., str]
) -> None:
    """The sweep found the job ended and old; before it got to it, the job was queued again."""
    settings.max_crashes = 1
    job_id = work(crash_at=3)
    with database.write() as session:
        job_requests.retry(session, job_id, None)
    assert not retention.free(database, settings.data_dir, job_id)
    assert run_folders.folder(settings.data_dir, job_id).is_dir()


def test_what_a_killed_cleaner_put_aside_is_removed(
    database: Database, settings: Settings, work: Callable[..., str]
) -> None:
    job_id = work()
    assert run_folders.put_aside(settings.data_dir, job_id) is not None
    retention.clean(database, settings)
    assert list((settings.data_dir / "runs").iterdir()) == []


def test_artifacts_without_a_row_go_and_others_stay(
    database: Database, settings: Settings, client: TestClient, work: Callable[..., str]
) -> None:
    work()
    root = settings.data_dir / "artifacts"
    before = files(root)
    for orphan in ("adapters/sha256-" + "0" * 64, "reports/sha256-" + "1" * 64, "adapters/.sha256-1.7.tmp"):
        (root / orphan).mkdir()
        (root / orphan / "x").write_text("x")
    with retention.artifacts_held(settings.data_dir), retention.artifacts_held(settings.data_dir):
        assert retention.collect(database, settings.data_dir) == 0, "somebody publishes"
    assert retention.collect(database, settings.data_dir) == 3
    assert files(root) == before
    assert client.get("/adapters/brain/versions/1/download").status_code == 200


def test_nothing_is_collected_between_an_artifact_and_its_row(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner that works on while an attempt publishes: the stored adapter is there when its row comes."""
    publish = adapters.publish
    collected = []

    def slow(*given: Any, **values: Any) -> Any:
        with database.read():
            collected.append(retention.collect(database, settings.data_dir))
        return publish(*given, **values)

    monkeypatch.setattr(adapters, "publish", slow)
    run_job(database, settings, new_job(), lambda: False)
    assert collected == [0]
    with database.read() as session:
        digest = session.scalars(select(AdapterVersion.digest)).one()
    assert adapters.folder(settings.data_dir, digest).is_dir()


def test_idempotency_keys_are_forgotten_after_their_time(
    client: TestClient, database: Database, settings: Settings, dataset: Any
) -> None:
    body, headers = {"dataset": dataset.id, "adapter": "brain"}, {"Idempotency-Key": "k"}
    client.post("/align", json=body, headers=headers)
    assert retention.clean(database, settings) == 0
    assert client.post("/align", json=body, headers=headers).headers["idempotent-replayed"] == "true"
    settings.keep_idempotency_s = 0.0
    assert retention.clean(database, settings) == 1
    assert "idempotent-replayed" not in client.post("/align", json=body, headers=headers).headers


def test_thorough_sweep_cleans_and_a_plain_one_does_not(
    database: Database, settings: Settings, work: Callable[..., str], valkey: str
) -> None:
    from service.queue import make_celery
    from worker import sweep

    settings.keep_runs_s = 0.0
    settings.redis_url = valkey
    job_id = work()
    sweep.sweep_once(database, make_celery(settings), settings)
    assert run_folders.folder(settings.data_dir, job_id).is_dir()
    sweep.sweep_once(database, make_celery(settings), settings, clean=True)
    assert not run_folders.folder(settings.data_dir, job_id).exists()


def test_put_aside_of_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert run_folders.put_aside(tmp_path, "job_none") is None
    os.makedirs(tmp_path / "runs" / ".gone-1" / "x")
    assert run_folders.clear_aside(tmp_path / "runs") == 1


def test_unknown_job_is_not_deleted(database: Database) -> None:
    with pytest.raises(Problem, match="job_not_found"), database.write() as session:
        retention.delete_job(session, "job_none")
