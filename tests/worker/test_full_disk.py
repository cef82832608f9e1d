"""A disk that is full: jobs wait or are handed back and go on once there is room, questions and reads are answered all the while.

On SQLite the database lies on the same disk. A tmpfs of some megabytes, where one may be mounted; elsewhere a limit on the size of files.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service import job_requests
from service.app import create_app
from service.db import Database
from service.settings import Settings
from tests.conftest import STAND_IN, dataset_zip, png, wait_for
from tests.service.test_vqa import Echo
from tests.small_disk import SmallDisk, small_disk
from tests.worker.test_attempts import assert_whole, events_of, job_of, never, versions
from worker import sweep
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

Tell = Callable[..., None]
NewJob = Callable[..., str]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Under the data folder. It comes before the database in each test's arguments."""
    with small_disk(tmp_path / "data", 24) as mounted:
        if mounted is None:
            pytest.skip("no tmpfs may be mounted here")
        yield mounted


def reasons(database: Database, job_id: str) -> list[str]:
    return [e.data["reason"] for e in events_of(database, job_id) if "reason" in e.data]


def test_low_disk_stops_the_run_after_a_checkpoint_and_the_job_waits_for_room(
    disk: SmallDisk, database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(steps=500)
    settings.disk_reserve_bytes = 4 * 2**20
    job_id, waiting = new_job(), new_job()
    with disk.full(left=2 * 2**20) as fill:
        fill()
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).attempts == 0, "it is not even claimed"
    started = []

    def fill_once() -> bool:
        if not started and len(events_of(database, job_id)) > 6:
            started.append(disk.full(left=2 * 2**20))
            started[0].__enter__()()
        return False

    run_job(database, settings, job_id, fill_once)
    assert started
    job = job_of(database, job_id)
    assert (job.status, job.error_code) == ("queued", None)
    assert reasons(database, job_id) == ["disk_full"]
    assert [e.type for e in events_of(database, job_id)][-2:] == ["checkpoint", "status"]
    for other in (job_id, waiting):
        run_job(database, settings, other, never)
        assert job_of(database, other).status == "queued"
    started[0].__exit__(None, None, None)
    stand_in(steps=20)
    for other in (job_id, waiting):
        run_job(database, settings, other, never)
        assert job_of(database, other).status == "succeeded"
        assert_whole(database, other)
    assert job_of(database, job_id).attempts == 2


def test_disk_without_a_free_byte_loses_nothing(
    disk: SmallDisk, database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """Filled to the last byte under a run. On SQLite not even that can be written down: the lease runs out and the sweep takes it back."""
    stand_in(steps=200)
    settings.disk_reserve_bytes, settings.lease_s = 0, 1.5
    job_id, filled = new_job(), []

    def fill_once() -> bool:
        if not filled and len(events_of(database, job_id)) > 6:
            filled.append(disk.full())
            filled[0].__enter__()()
        return False

    run_job(database, settings, job_id, fill_once)
    assert filled
    assert job_of(database, job_id).status in ("running", "queued")
    filled[0].__exit__(None, None, None)
    stand_in(steps=20)
    wait_for(lambda: sweep.reap(database, 3) or job_of(database, job_id).status == "queued")
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"
    assert versions(database) == 1
    assert_whole(database, job_id)


def test_run_that_finds_no_room_again_and_again_fails_and_says_what_to_do(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """A limit on the size of files stands in for the disk. `retry` goes on where there is room."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); sys.argv = sys.argv[1:]; "
    )
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    whole, settings.run_command = settings.run_command, [sys.executable, "-c", limited, str(STAND_IN)]
    job_id = new_job()
    for expected in ("queued", "queued", "failed"):
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).status == expected
    job = job_of(database, job_id)
    assert job.error_code == "disk_full"
    assert "free some space" in (job.error_message or "")
    assert reasons(database, job_id) == ["disk_full", "disk_full"]
    settings.run_command = whole
    with database.write() as session:
        job_requests.retry(session, job_id, None)
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"
    assert_whole(database, job_id)


def test_adapter_that_cannot_be_stored_is_published_once_there_is_room(
    disk: SmallDisk, database: Database, settings: Settings, new_job: NewJob, stand_in: Tell, tmp_path: Path
) -> None:
    """The run has ended well; what is missing is room for the artifact. Nothing half is left, and the next attempt only publishes."""
    gate = tmp_path / "gate"
    gate.write_text("reporting")
    stand_in(hold=str(gate))
    settings.disk_reserve_bytes = 0
    job_id, filled = new_job(), []

    def fill_once() -> bool:
        if not filled and gate.with_suffix(".here").exists():
            (disk.path / "artifacts").mkdir(exist_ok=True)
            (disk.path / "artifacts" / ".lock").touch()
            filled.append(disk.full())
            filled[0].__enter__()()
            gate.unlink()
        return False

    settings.lease_s = 1.5
    run_job(database, settings, job_id, fill_once)
    assert filled
    filled[0].__exit__(None, None, None)
    assert versions(database) == 0
    assert not [p for p in (disk.path / "artifacts").rglob("*") if p.is_file() and p.name != ".lock"]
    wait_for(lambda: sweep.reap(database, 3) or job_of(database, job_id).status == "queued")
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"
    skipped = [e.data["stage"] for e in events_of(database, job_id) if e.data.get("status") == "skipped"]
    assert skipped == ["generating"]


def test_questions_and_reads_are_answered_on_a_full_disk(
    disk: SmallDisk, database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    settings.disk_reserve_bytes = 0
    job_id = new_job()
    run_job(database, settings, job_id, never)
    new = {"dataset": job_of(database, job_id).dataset_id, "adapter": "other"}
    question = {"image": {"base64": base64.b64encode(png()).decode()}, "question": "Where?", "adapter": "brain"}
    with TestClient(create_app(settings, Echo(settings)), base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, 5)
        with disk.full() as fill:
            fill()
            assert client.post("/vqa", json=question).status_code == 200
            for path in (
                "/jobs",
                f"/jobs/{job_id}",
                "/adapters/brain",
                "/adapters/brain/versions/1",
                f"/jobs/{job_id}/events",
            ):
                assert client.get(path).status_code == 200, path
            assert client.get("/adapters/brain/versions/1/download").status_code == 200
            upload = client.post("/datasets", files={"file": ("x.zip", dataset_zip(7))})
            assert (upload.status_code, upload.json()["code"]) == (507, "disk_full")
            assert "free some space" in upload.json()["detail"].lower()
            asked = client.post("/align", json=new)
            elsewhere = settings.database.startswith("postgresql")
            assert asked.status_code == (202 if elsewhere else 507), asked.text
        assert client.post("/datasets", files={"file": ("x.zip", dataset_zip(7))}).status_code == 201
        assert client.post("/align", json=new).status_code == 202
        left = [p.name for p in (disk.path / "datasets").iterdir() if p.name.startswith(".")]
        assert not left
