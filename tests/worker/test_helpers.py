"""Two real workers on one job: what they make together is what one makes, whoever of them is killed or stopped, and jobs come first."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from hscr.artifacts import file_digest
from service import job_requests, jobs
from service.archive import ArchiveLimits
from service.datasets import import_upload
from service.db import Database
from service.models import AdapterVersion, GenerationShard
from service.settings import Settings
from tests.conftest import alive, dataset_zip, wait_for
from tests.worker.test_celery import Processes, assert_succeeded_once, processes, status  # noqa: F401 - a fixture
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

Tell = Callable[..., None]
RECORDS, RECORD_S = 24, 0.25


@pytest.fixture
def shared_job(database: Database, settings: Settings, new_job: Callable[..., str]) -> Callable[..., str]:
    """Make a job of 24 records, six seconds' work for one worker."""
    limits = ArchiveLimits(2**20, 100)
    data = import_upload(database, settings.data_dir, io.BytesIO(dataset_zip(RECORDS)), "many", limits, 100)[0]
    return lambda **values: new_job(dataset_id=data.id, config={"preference": {"batch_size": 2}}, **values)


@pytest.fixture
def alone(database: Database, settings: Settings, shared_job: Callable[..., str], stand_in: Tell) -> str:
    """Digest of the preferences that one worker makes, and the job slowed down for two."""
    stand_in(record_s=0)
    job_id = shared_job()
    run_job(database, settings, job_id, lambda: False)
    digest = preferences(database, settings, job_id)
    stand_in(record_s=RECORD_S)
    return digest


def preferences(database: Database, settings: Settings, job_id: str) -> str:
    """The file that the run wrote, which is also what the version says of itself."""
    (path,) = (settings.data_dir / "runs" / job_id).glob("attempt-*/preferences.jsonl")
    with database.read() as session:
        said = session.scalar(select(AdapterVersion.preferences_digest).where(AdapterVersion.job_id == job_id))
    assert said == file_digest(path)
    return said


def shards_of(database: Database, job_id: str) -> list[GenerationShard]:
    with database.read() as session:
        return list(session.scalars(select(GenerationShard).where(GenerationShard.job_id == job_id)))


def events(database: Database, job_id: str, kind: str) -> list[dict[str, Any]]:
    with database.read() as session:
        return [e.data for e in jobs.events_after(session, job_id, 0, 10_000) if e.type == kind]


class Two:
    """A job that two workers share: who helps, who has the job."""

    def __init__(self, processes: Processes, job_id: str) -> None:  # noqa: F811
        self.workers = [processes.worker("-n", f"w{n}@here") for n in (1, 2)]
        for (
            worker
        ) in self.workers:  # before a bell is rung: on busy cores the first would be done before the second is there
            wait_for(psutil.Process(worker.pid).children, 60, "the worker is up")
        self.sweep = processes.sweep()
        self.job_id = job_id
        self.helper: psutil.Process = wait_for(lambda: self.running("--shard"), 40, "somebody helps")
        self.run: psutil.Process = wait_for(lambda: self.running("--out"), 5, "the job's own run")

    def running(self, flag: str) -> psutil.Process | None:
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            ours = flag in line and any(self.job_id in part for part in line)
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                return process
        return None

    def family(self, run: psutil.Process) -> list[psutil.Process]:
        """A run, its supervisor and Celery's main process."""
        return [run, *run.parents()[:2]]

    def main(self, run: psutil.Process) -> subprocess.Popen[bytes]:
        pid = run.parents()[1].pid
        return next(w for w in self.workers if w.pid == pid)


def send(family: list[psutil.Process], number: int) -> None:
    for process in reversed(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.thorough
def test_two_workers_make_together_what_one_makes(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
) -> None:
    job_id = shared_job()
    Two(processes, job_id)
    job = assert_succeeded_once(database, job_id)
    assert preferences(database, settings, job_id) == alone
    taken = sum(e["last"] - e["first"] + 1 for e in events(database, job_id, "part"))
    assert taken >= RECORDS / 6, "the helper's part is used"
    assert job.stage_seconds["generating"] < RECORDS * RECORD_S + 1
    assert job.attempts == 1


@pytest.mark.thorough
@pytest.mark.parametrize("victim", ["run", "supervisor", "main"])
def test_a_helper_that_is_killed_costs_its_own_work_only(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
    victim: str,
) -> None:
    two = Two(processes, shared_job())
    family = two.family(two.helper)
    family[("run", "supervisor", "main").index(victim)].kill()
    wait_for(lambda: not alive(two.helper.pid), 3, "its run dies with it")
    job = assert_succeeded_once(database, two.job_id)
    assert preferences(database, settings, two.job_id) == alone
    assert (job.attempts, job.crashes) == (1, 0)
    if victim == "run":
        assert sum(s.crashes for s in shards_of(database, two.job_id)) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("alone_asleep", [True, False])
def test_nobody_waits_for_a_helper_that_was_stopped(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
    alone_asleep: bool,
) -> None:
    """STOP of the helper's supervisor alone, or of all its processes, past its lease; then it wakes up, and can do no harm."""
    two = Two(processes, shared_job())
    family = two.family(two.helper)
    send(family[1:] if alone_asleep else family, signal.SIGSTOP)
    began = time.monotonic()
    assert_succeeded_once(database, two.job_id)
    assert time.monotonic() - began < 2 * RECORDS * RECORD_S
    assert preferences(database, settings, two.job_id) == alone
    assert sum(s.crashes for s in shards_of(database, two.job_id)) >= 1, "its lease ran out"
    before = [(s.number, s.status, s.fence) for s in shards_of(database, two.job_id)]
    send(family, signal.SIGCONT)
    wait_for(lambda: not alive(two.helper.pid), 5, "it goes")
    assert [(s.number, s.status, s.fence) for s in shards_of(database, two.job_id)] == before


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_the_helper_takes_the_job_over_when_its_worker_is_lost(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
    number: int,
) -> None:
    two = Two(processes, shared_job())
    wait_for(lambda: any(s.status == "done" for s in shards_of(database, two.job_id)), 20, "one part is there")
    family = two.family(two.run)
    send(family, number)
    if number == signal.SIGSTOP:  # past its lease; its run holds the folder's lock until it is awake
        time.sleep(4)
        send(family, signal.SIGCONT)
    job = assert_succeeded_once(database, two.job_id)
    assert job.attempts == 2
    assert preferences(database, settings, two.job_id) == alone
    assert events(database, two.job_id, "part"), "what was made for the lost attempt serves the next one"


@pytest.mark.thorough
def test_a_job_survives_the_loss_of_both(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
) -> None:
    two = Two(processes, shared_job())
    send(two.family(two.helper) + two.family(two.run), signal.SIGKILL)
    for worker in two.workers:
        worker.wait()
    processes.worker()
    processes.worker("-n", "again@here")
    assert_succeeded_once(database, two.job_id)
    assert preferences(database, settings, two.job_id) == alone


@pytest.mark.thorough
@pytest.mark.parametrize("wish", ["cancel", "pause"])
def test_cancel_and_pause_free_both_devices_within_seconds(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
    wish: str,
) -> None:
    two = Two(processes, shared_job())
    with database.write() as session:
        getattr(job_requests, wish)(session, two.job_id)
    wait_for(lambda: not alive(two.helper.pid) and not alive(two.run.pid), 10, "both devices are free")
    wait_for(lambda: status(database, two.job_id) == {"cancel": "cancelled", "pause": "paused"}[wish], 5)
    wait_for(lambda: not [s for s in shards_of(database, two.job_id) if s.status == "running"], 5)
    if wish == "pause":
        with database.write() as session:
            job_requests.resume(session, two.job_id)
        assert_succeeded_once(database, two.job_id)
        assert preferences(database, settings, two.job_id) == alone


@pytest.mark.thorough
def test_a_new_job_gets_the_helpers_worker(
    database: Database,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    new_job: Callable[..., str],
    stand_in: Tell,
    alone: str,
) -> None:
    two = Two(processes, shared_job())
    asked = time.monotonic()
    other = new_job()
    wait_for(lambda: status(database, other) != "queued", 8, "it runs")
    print(f"the new job ran after {time.monotonic() - asked:.1f} s")
    assert status(database, two.job_id) == "running"
    assert not alive(two.helper.pid)
    assert_succeeded_once(database, other)
    assert_succeeded_once(database, two.job_id)


@pytest.mark.thorough
def test_a_worker_told_to_stop_leaves_its_shard_at_once(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
) -> None:
    two = Two(processes, shared_job())
    worker = two.main(two.helper)
    worker.terminate()
    assert worker.wait(10) == 0
    assert not alive(two.helper.pid)
    assert {s.crashes for s in shards_of(database, two.job_id)} == {0}
    assert "running" not in {s.status for s in shards_of(database, two.job_id)}
    assert_succeeded_once(database, two.job_id)
    assert preferences(database, settings, two.job_id) == alone


@pytest.mark.thorough
def test_a_flushed_broker_costs_no_help(
    database: Database,
    settings: Settings,
    processes: Processes,  # noqa: F811
    shared_job: Callable[..., str],
    alone: str,
) -> None:
    import redis

    two = Two(processes, shared_job())
    two.helper.kill()
    with redis.Redis.from_url(settings.redis_url) as client:
        client.flushall()
    wait_for(lambda: two.running("--shard"), 20, "somebody helps again")
    assert_succeeded_once(database, two.job_id)
    assert preferences(database, settings, two.job_id) == alone
