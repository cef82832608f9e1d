"""Real processes: a Celery worker, the sweep and Valkey, killed and flushed while jobs run. Both databases; the run is the stand-in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import func, select

from service import job_requests, jobs
from service.db import Database
from service.models import AdapterVersion, Job, Outbox
from service.queue import QUEUE, TASK, make_celery, ring, waiting_bells
from service.settings import Settings
from tests.conftest import STAND_IN, alive, wait_for
from worker import sweep

pytestmark = pytest.mark.either_database

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "celery", "-A", "worker.tasks", "worker", "--loglevel=INFO", "--concurrency=1"]
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
Tell = Callable[..., None]
NewJob = Callable[..., str]


class Processes:
    """A worker and a sweep on the test's database and broker, which can be killed and started again."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.log = log
        self.environment = dict(os.environ) | {
            "DATABASE_URL": settings.database,
            "REDIS_URL": settings.redis_url,
            "HSCR_DATA_DIR": str(settings.data_dir),
            "HSCR_RUN_COMMAND": f"{sys.executable} {STAND_IN}",
            "HSCR_GENERATE_COMMAND": f"{sys.executable} {STAND_IN} --generate",
            "HSCR_SHARE_WORTH": "0.5",
            "HSCR_LEASE_S": "1.5",
            "HSCR_STOP_GRACE_S": "2",
            "HSCR_RING_AFTER_S": "0.3",
            "HSCR_SWEEP_INTERVAL_S": "0.1",
            "HSCR_MAX_CRASHES": "10",  # here they are killed in the same place on purpose
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start([*WORKER, *options])

    def sweep(self) -> subprocess.Popen[bytes]:
        return self.start([sys.executable, "-m", "worker.sweep"])

    def stop(self) -> None:
        for process in self.started:
            family = [process]
            if process.poll() is None:
                family += psutil.Process(process.pid).children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()


@pytest.fixture
def processes(settings: Settings, valkey: str, tmp_path: Path, stand_in: Tell) -> Iterator[Processes]:
    settings.redis_url = valkey
    started = Processes(settings, tmp_path / "processes.log")
    yield started
    started.stop()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def status(database: Database, job_id: str) -> str:
    with database.read() as session:
        return jobs.get(session, job_id).status


def assert_succeeded_once(database: Database, job_id: str) -> Job:
    wait_for(lambda: status(database, job_id) == "succeeded", what="the job succeeds")
    with database.read() as session:
        assert session.scalar(select(func.count()).where(AdapterVersion.job_id == job_id)) == 1
        rows = jobs.events_after(session, job_id, 0, 10_000)
        assert [r.seq for r in rows] == list(range(1, len(rows) + 1))
        return jobs.get(session, job_id)


def run_holds(gate: Path) -> int:
    here = gate.with_suffix(".here")
    return int(wait_for(lambda: here.is_file() and here.read_text(), what="the run holds"))


def supervisor_of(run: int) -> int:
    return psutil.Process(run).ppid()


@pytest.mark.parametrize(
    "stage", ["optimizing", *(pytest.param(s, marks=pytest.mark.thorough) for s in ("generating", "reporting"))]
)
def test_job_succeeds_once_though_run_supervisor_and_worker_are_killed(
    database: Database, processes: Processes, new_job: NewJob, stand_in: Tell, gate: Path, stage: str
) -> None:
    """kill -9, in one stage, of the run, then of the supervisor (Celery's child), then of Celery's main process."""
    stand_in(hold=str(gate), steps=4)
    gate.write_text(stage)
    here = gate.with_suffix(".here")
    processes.sweep()
    worker = processes.worker()
    job_id = new_job()
    for victim in ("run", "supervisor", "main"):
        run = run_holds(gate)
        supervisor = supervisor_of(run)
        here.unlink()
        os.kill({"run": run, "supervisor": supervisor, "main": worker.pid}[victim], signal.SIGKILL)
        wait_for(lambda: not alive(run), 5, "the run is dead")  # noqa: B023
        if victim == "main":
            worker.wait()
            wait_for(lambda: not alive(supervisor), 5, "the supervisor is gone")  # noqa: B023
            gate.unlink()
            stand_in(steps=4)
            processes.worker()
    job = assert_succeeded_once(database, job_id)
    assert job.attempts == 4


def test_worker_told_to_stop_hands_its_job_back_at_once(
    database: Database, processes: Processes, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(steps=10_000)
    worker = processes.worker()
    processes.sweep()
    job_id = new_job()

    def working() -> bool:
        with database.read() as session:
            return (jobs.get(session, job_id).progress or {}).get("stage") == "optimizing"

    wait_for(working, what="the run optimises")
    worker.terminate()
    assert worker.wait(10) == 0
    assert status(database, job_id) == "queued"
    with database.read() as session:
        job = jobs.get(session, job_id)
        assert (job.crashes, job.lease_until) == (0, None)
        assert jobs.events_after(session, job_id, 0, 10_000)[-1].data == {
            "status": "queued",
            "reason": "worker_stopping",
        }
    stand_in(steps=30)
    processes.worker()
    assert assert_succeeded_once(database, job_id).attempts == 2


def test_running_job_is_cancelled_within_seconds(
    database: Database, processes: Processes, new_job: NewJob, stand_in: Tell, gate: Path
) -> None:
    """The run is deaf to TERM and has a child; the next job gets the freed worker."""
    stand_in(hold=str(gate), ignore_term=True, child=True)
    gate.write_text("optimizing")
    processes.worker()
    processes.sweep()
    job_id = new_job()
    run = run_holds(gate)
    grandchild = int((Path(processes.environment["HSCR_DATA_DIR"]) / "runs" / job_id / "grandchild.pid").read_text())
    with database.write() as session:
        job_requests.cancel(session, job_id)
    wait_for(lambda: status(database, job_id) == "cancelled", 8)
    assert not alive(run)
    assert not alive(grandchild)
    gate.unlink()
    stand_in()
    assert_succeeded_once(database, new_job())


@pytest.mark.thorough
def test_flushed_broker_loses_no_job(
    database: Database, settings: Settings, processes: Processes, new_job: NewJob
) -> None:
    """The bells are rung and then flushed, together with the whole broker; without the second ringing the jobs would wait for ever."""
    celery = make_celery(settings)
    ids = [new_job() for _ in range(3)]
    assert sweep.relay(database, celery) == 3
    assert waiting_bells(celery) == 3
    with redis.Redis.from_url(settings.redis_url) as client:
        client.flushall()
    processes.worker()
    processes.sweep()
    for job_id in ids:
        assert_succeeded_once(database, job_id)


def test_forged_doubled_and_pickled_messages_do_no_harm(
    database: Database, settings: Settings, processes: Processes, new_job: NewJob
) -> None:
    celery = make_celery(settings)
    for forged in ("job_0000000000000000000000000000", "../../etc", "x" * 10_000, 7, None, {"a": 1}):
        celery.send_task(TASK, args=[forged], queue=QUEUE)
    celery.send_task(TASK, args=[], queue=QUEUE)
    celery.send_task("os.system", args=["true"], queue=QUEUE)
    pickled = make_celery(settings)
    pickled.conf.update(task_serializer="pickle", accept_content=["pickle"])
    job_id = new_job()
    pickled.send_task(TASK, args=[job_id], queue=QUEUE, serializer="pickle")
    for _ in range(10):
        ring(celery, job_id)
    processes.worker()
    processes.sweep()
    assert assert_succeeded_once(database, job_id).attempts == 1


@pytest.mark.thorough
def test_raw_bytes_in_the_broker_do_not_end_the_worker(
    database: Database, settings: Settings, processes: Processes, new_job: NewJob
) -> None:
    worker = processes.worker()
    deep = b"[" * 100_000
    odd = (
        b"\xff\x00",
        b"",
        b"{",
        b"7",
        b"null",
        b"[]",
        b"{}",
        deep,
        b'{"body": 7, "properties": {}}',
        b'{"properties": 3}',
        b'{"body": "x", "headers": {}, "properties": {"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}}',
    )
    with redis.Redis.from_url(settings.redis_url) as client:
        for raw in odd:
            client.lpush(QUEUE, raw)
    job_id = new_job()
    processes.sweep()
    assert_succeeded_once(database, job_id)
    assert worker.poll() is None


def test_sweep_rings_only_for_jobs_whose_bell_is_lost(
    database: Database, settings: Settings, valkey: str, new_job: NewJob
) -> None:
    settings.redis_url = valkey
    celery = make_celery(settings)
    job_id = new_job()
    assert sweep.ring_again(database, celery, 0) == 0, "its first bell is still in the outbox"
    assert sweep.relay(database, celery) == 1
    assert sweep.relay(database, celery) == 0
    assert sweep.ring_again(database, celery, 0) == 0, "its bell still waits in the broker"
    with redis.Redis.from_url(valkey) as client:
        client.flushall()
    assert sweep.ring_again(database, celery, 60) == 0, "too early"
    assert sweep.ring_again(database, celery, 0) == 1
    assert waiting_bells(celery) == 1
    with database.write() as session:
        job_requests.cancel(session, job_id)
    with redis.Redis.from_url(valkey) as client:
        client.flushall()
    assert sweep.ring_again(database, celery, 0) == 0


def test_broker_that_is_away_keeps_the_bells_in_the_outbox(
    database: Database, settings: Settings, new_job: NewJob
) -> None:
    settings.redis_url = "redis://127.0.0.1:1/0"
    new_job()
    sweep.sweep_once(database, make_celery(settings), settings)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 1


def test_queued_job_past_its_deadline_is_failed_by_the_sweep(database: Database, new_job: NewJob) -> None:
    job_id = new_job(deadline_s=0.01)
    wait_for(lambda: sweep.reap(database, 3))
    with database.read() as session:
        job: Any = jobs.get(session, job_id)
    assert (job.status, job.error_code) == ("failed", "deadline")


@pytest.mark.thorough
def test_sweep_says_whether_it_is_alive(settings: Settings, processes: Processes) -> None:
    command = [sys.executable, "-m", "worker.sweep", "--healthy"]
    assert subprocess.run(command, cwd=ROOT, env=processes.environment, check=False).returncode == 1
    process = processes.sweep()
    wait_for(lambda: sweep.heartbeat_file(settings).is_file())
    assert subprocess.run(command, cwd=ROOT, env=processes.environment, check=False).returncode == 0
    process.terminate()
    assert process.wait(5) == 0
