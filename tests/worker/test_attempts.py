"""One attempt at a job, supervised in this process: how it ends, what it writes, and what it leaves running. The run is the stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from service import adapters, job_requests, jobs
from service.db import Database, now
from service.models import AdapterVersion, Job, JobEvent
from service.settings import Settings
from tests.conftest import alive, wait_for
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

Tell = Callable[..., None]
NewJob = Callable[..., str]


def never() -> bool:
    return False


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return jobs.get(session, job_id)


def events_of(database: Database, job_id: str) -> list[JobEvent]:
    with database.read() as session:
        return jobs.events_after(session, job_id, 0, 10_000)


def assert_whole(database: Database, job_id: str) -> None:
    """The job's events are numbered 1, 2, 3 … and its last one tells its status."""
    rows = events_of(database, job_id)
    assert [r.seq for r in rows] == list(range(1, len(rows) + 1))
    assert [r for r in rows if r.type == "status"][-1].data["status"] == job_of(database, job_id).status


def versions(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(AdapterVersion)) or 0


def test_a_run_that_succeeds_is_published_once(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    job_id = new_job()
    run_job(database, settings, job_id, never)
    job = job_of(database, job_id)
    assert (job.status, job.attempts, job.fence) == ("succeeded", 1, 1)
    assert job.metrics["optimizing"]["step"] == 5
    assert job.report is not None
    assert_whole(database, job_id)
    with database.read() as session:
        version = session.scalars(select(AdapterVersion)).one()
    assert (version.adapter_name, version.version, version.job_id) == ("brain", 1, job_id)
    folder = adapters.folder(settings.data_dir, version.digest)
    assert (folder / "adapter_model.safetensors").is_file()


def test_versions_of_one_name_count_up(database: Database, settings: Settings, new_job: NewJob, stand_in: Tell) -> None:
    for expected in (1, 2):
        job_id = new_job()
        run_job(database, settings, job_id, never)
        with database.read() as session:
            assert session.scalar(select(AdapterVersion.version).where(AdapterVersion.job_id == job_id)) == expected


def test_second_delivery_is_ignored(database: Database, settings: Settings, new_job: NewJob, stand_in: Tell) -> None:
    job_id = new_job()
    run_job(database, settings, job_id, never)
    before = [e.seq for e in events_of(database, job_id)]
    run_job(database, settings, job_id, never)
    assert [e.seq for e in events_of(database, job_id)] == before
    assert versions(database) == 1


def test_delivery_while_the_job_runs_is_ignored(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    job_id = new_job()

    def again() -> bool:
        with database.write() as session:
            assert jobs.claim(session, job_id, 10) is None
        return False

    run_job(database, settings, job_id, again)
    assert job_of(database, job_id).status == "succeeded"
    assert job_of(database, job_id).attempts == 1


def test_bell_of_an_unknown_job_is_ignored(database: Database, settings: Settings) -> None:
    run_job(database, settings, "job_0000000000000000000000000000", never)


def test_superseded_attempt_changes_nothing(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """While the first attempt works, its lease is taken away and a second claim made: from then on the first writes nothing."""
    stand_in(steps=1000)
    job_id = new_job()
    seen: dict[str, Any] = {}

    def supersede() -> bool:
        if not seen and len(events_of(database, job_id)) > 4:
            with database.write() as session:
                session.execute(update(Job).where(Job.id == job_id).values(lease_until=now()))
            with database.write() as session:
                assert jobs.reap(session, job_id, 3) == "queued"
            with database.write() as session:
                seen["claim"] = jobs.claim(session, job_id, 60)
            seen["events"] = [e.seq for e in events_of(database, job_id)]
        return False

    run_job(database, settings, job_id, supersede)
    job = job_of(database, job_id)
    assert (job.status, job.fence) == ("running", seen["claim"].fence)
    assert [e.seq for e in events_of(database, job_id)] == seen["events"]
    assert versions(database) == 0


@pytest.mark.parametrize("write", ["heartbeat", "fail", "cancelled", "hand_back", "crash", "publish"])
def test_every_write_of_an_old_fence_is_refused(
    database: Database, settings: Settings, new_job: NewJob, write: str
) -> None:
    job_id = new_job()
    with database.write() as session:
        old = jobs.claim(session, job_id, 10)
    assert old is not None
    with database.write() as session:
        jobs.hand_back(session, old, "test")
    with database.write() as session:
        assert jobs.claim(session, job_id, 10) is not None
    before = job_of(database, job_id)
    writes: dict[str, Callable[[Any], Any]] = {
        "heartbeat": lambda s: jobs.heartbeat(s, old, 100),
        "fail": lambda s: jobs.fail(s, old, "x", "x"),
        "cancelled": lambda s: jobs.cancelled(s, old),
        "hand_back": lambda s: jobs.hand_back(s, old, "x"),
        "crash": lambda s: jobs.crash(s, job_id, old.fence, "x", "x", 3),
        "publish": lambda s: adapters.publish(s, old, digest="sha256:0", metrics={}, result={}, report=None),
    }
    with pytest.raises(jobs.Superseded), database.write() as session:
        writes[write](session)
    after = job_of(database, job_id)
    assert (after.status, after.fence, after.last_seq, after.lease_until) == (
        "running",
        before.fence,
        before.last_seq,
        before.lease_until,
    )
    assert versions(database) == 0


def test_bad_input_fails_at_once_with_the_runs_words(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(exit=2)
    job_id = new_job()
    run_job(database, settings, job_id, never)
    job = job_of(database, job_id)
    assert (job.status, job.attempts, job.error_code) == ("failed", 1, "bad_records")
    assert_whole(database, job_id)


def test_crash_loop_is_failed_after_three_attempts(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(crash_at=2)
    job_id = new_job()
    for expected in ("queued", "queued", "failed"):
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).status == expected
    job = job_of(database, job_id)
    assert (job.attempts, job.error_code) == (3, "run_crashed")
    assert job.error_message == "the run ended with signal 9; 3 attempts in a row ended so without progress"
    assert_whole(database, job_id)


def test_crashes_with_progress_between_them_do_not_add_up(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """Five attempts, each killed one step later than the one before: the job is never given up."""
    job_id = new_job()
    for step in range(2, 7):
        (settings.data_dir / "runs" / job_id / "crashes").unlink(missing_ok=True)
        stand_in(steps=10, crash_at=step, crashes=1)
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).status == "queued"
    stand_in(steps=10)
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"


def test_resumed_run_gives_the_uninterrupted_runs_adapter(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    whole, killed = new_job(), new_job()
    run_job(database, settings, whole, never)
    stand_in(crash_at=4, crashes=1)
    run_job(database, settings, killed, never)
    run_job(database, settings, killed, never)
    with database.read() as session:
        digests = session.scalars(select(AdapterVersion.digest)).all()
    assert job_of(database, killed).attempts == 2
    assert len(digests) == 2
    assert len(set(digests)) == 1
    skipped = [e for e in events_of(database, killed) if e.data.get("status") == "skipped"]
    assert [e.data["stage"] for e in skipped] == ["generating"]


@pytest.mark.parametrize("deaf", [True, False])
def test_cancel_stops_the_run_and_leaves_no_child(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell, deaf: bool
) -> None:
    """The run has a child that ignores TERM, and may ignore it too: whichever way its leader ends, the whole group is gone."""
    stand_in(steps=10_000, ignore_term=deaf, child=True)
    settings.stop_grace_s = 0.3
    job_id = new_job()

    def cancel() -> bool:
        if len(events_of(database, job_id)) >= 5:
            with database.write() as session:
                job_requests.cancel(session, job_id)
        return False

    run_job(database, settings, job_id, cancel)
    job = job_of(database, job_id)
    assert (job.status, job.error_code) == ("cancelled", None)
    assert not alive(int((settings.data_dir / "runs" / job_id / "grandchild.pid").read_text()))
    assert_whole(database, job_id)


def test_deadline_stops_the_run(database: Database, settings: Settings, new_job: NewJob, stand_in: Tell) -> None:
    stand_in(steps=10_000)
    job_id = new_job(deadline_s=1.0)
    run_job(database, settings, job_id, never)
    assert (job_of(database, job_id).status, job_of(database, job_id).error_code) == ("failed", "deadline")


def test_worker_that_stops_hands_its_job_back_with_a_checkpoint(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(steps=10_000)
    job_id = new_job()
    run_job(database, settings, job_id, lambda: len(events_of(database, job_id)) > 6)
    job = job_of(database, job_id)
    assert (job.status, job.crashes, job.lease_until) == ("queued", 0, None)
    assert [e.type for e in events_of(database, job_id)][-2:] == ["checkpoint", "status"]
    stand_in(steps=20)
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"


def test_run_without_a_result_or_with_a_damaged_adapter_is_a_crash(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(damage=True)
    job_id = new_job()
    settings.max_crashes = 1
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).error_code == "adapter_damaged"
    assert versions(database) == 0
    settings.run_command = [sys.executable, "-c", "pass"]
    job_id = new_job()
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).error_code == "no_result"


def test_the_models_commit_device_and_precision_reach_the_run(
    database: Database, settings: Settings, new_job: NewJob, tmp_path: Path
) -> None:
    told, settings.model_revision, settings.max_crashes = tmp_path / "told", "a" * 40, 1
    settings.device, settings.dtype = "cpu", "bfloat16"
    settings.run_command = [sys.executable, "-c", f"import sys; open({str(told)!r}, 'w').write(' '.join(sys.argv))"]
    run_job(database, settings, new_job(), never)
    assert f" --revision {'a' * 40} --device cpu --dtype bfloat16 " in told.read_text()


def test_noise_on_the_runs_output_is_not_stored(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(noise=True)
    job_id = new_job()
    run_job(database, settings, job_id, never)
    rows = events_of(database, job_id)
    assert job_of(database, job_id).status == "succeeded"
    assert "question" not in str([r.data for r in rows])
    assert {r.type for r in rows} <= {"status", "stage", "progress", "metrics"}


def test_run_that_outlives_its_supervisor_blocks_the_next_attempt(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """Someone else holds the job's lock (as a zombie run would): the attempt waits, then is counted as a crash and starts no run."""
    job_id = new_job()
    folder = settings.data_dir / "runs" / job_id
    folder.mkdir(parents=True)
    code = f"import fcntl,time; f=open({str(folder / '.lock')!r},'w'); fcntl.flock(f,2); print('held',flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        settings.lock_wait_s = 0.3
        run_job(database, settings, job_id, never)
        job = job_of(database, job_id)
        assert (job.status, job.crashes) == ("queued", 1)
        assert not list(folder.glob("attempt-*"))
        settings.lock_wait_s = 10
        released = []

        def release() -> bool:
            if not released:
                released.append(holder.kill())
            return False

        run_job(database, settings, job_id, release)
        assert job_of(database, job_id).status == "succeeded"
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


SUPERVISOR = """
import sys
from service.db import Database
from service.settings import Settings
from worker.supervise import run_job

s = Settings.model_validate_json(sys.argv[1])
run_job(Database(s.database), s, sys.argv[2], lambda: False)
"""


def test_run_dies_with_its_supervisor(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell, tmp_path: Path
) -> None:
    """kill -9 of the supervisor: the run, deaf to TERM, is gone at once; after the lease the job is taken up again and succeeds once."""
    gate = tmp_path / "gate"
    gate.write_text("optimizing")
    stand_in(hold=str(gate), ignore_term=True)
    settings.lease_s = 1.5
    job_id = new_job()
    command = [sys.executable, "-c", SUPERVISOR, settings.model_dump_json(), job_id]
    supervisor = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        here = gate.with_suffix(".here")
        run = int(wait_for(lambda: here.is_file() and here.read_text(), what="the run holds"))
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        wait_for(lambda: not alive(run), 5, "the run is dead")
    finally:
        supervisor.kill()
        supervisor.wait()
    gate.unlink()

    def reaped() -> str | None:
        with database.write() as session:
            return jobs.reap(session, job_id, 3)

    assert wait_for(reaped, 5) == "queued"
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"
    assert versions(database) == 1
    assert_whole(database, job_id)


def test_runs_environment_holds_no_secret(
    database: Database, settings: Settings, new_job: NewJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HSCR_API_KEY", "HSCR_WEBHOOK_SECRET", "DATABASE_URL", "REDIS_URL"):
        monkeypatch.setenv(name, "canary")
    out = tmp_path / "environment"
    code = f"import os; open({str(out)!r},'w').write(repr(dict(os.environ)))"
    settings.run_command = [sys.executable, "-c", code]
    run_job(database, settings, new_job(), never)
    assert "canary" not in out.read_text()
    assert f"'HSCR_PARENT_PID': '{os.getpid()}'" in out.read_text()


@pytest.mark.parametrize(("given", "told"), [("", "DATA/cache/features"), ("/elsewhere", "/elsewhere"), ("off", "off")])
def test_runs_keep_image_features_in_the_data_folder(
    database: Database, settings: Settings, new_job: NewJob, tmp_path: Path, given: str, told: str
) -> None:
    out = tmp_path / "environment"
    code = f"import os; open({str(out)!r},'w').write(os.environ['HSCR_FEATURE_CACHE'])"
    settings.run_command, settings.feature_cache = [sys.executable, "-c", code], given
    run_job(database, settings, new_job(), never)
    assert out.read_text() == told.replace("DATA", str(settings.data_dir.resolve()))


def test_paused_run_frees_its_device_and_goes_on_from_its_checkpoint(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """Pause while it optimises: a checkpoint, no process left; after resume the next attempt ends with the uninterrupted run's adapter."""
    whole = new_job()
    stand_in(steps=100)
    run_job(database, settings, whole, never)
    job_id = new_job()
    stand_in(steps=100, child=True)

    def pause() -> bool:
        if any(e.type == "metrics" for e in events_of(database, job_id)):
            with database.write() as session:
                job_requests.pause(session, job_id)
        return False

    run_job(database, settings, job_id, pause)
    job = job_of(database, job_id)
    assert (job.status, job.crashes, job.pause_requested, job.lease_until) == ("paused", 0, False, None)
    assert not alive(int((settings.data_dir / "runs" / job_id / "grandchild.pid").read_text()))
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "paused", "a bell does not wake it"
    with database.write() as session:
        job_requests.resume(session, job_id)
    stand_in(steps=100)
    run_job(database, settings, job_id, never)
    assert (job_of(database, job_id).status, job_of(database, job_id).attempts) == ("succeeded", 2)
    assert_whole(database, job_id)
    with database.read() as session:
        assert len(set(session.scalars(select(AdapterVersion.digest)))) == 1


def test_failed_job_is_retried_from_its_checkpoint(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(crash_at=4)
    settings.max_crashes = 1
    job_id = new_job()
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "failed"
    with database.write() as session:
        job_requests.retry(session, job_id, None)
    stand_in()
    run_job(database, settings, job_id, never)
    job = job_of(database, job_id)
    assert (job.status, job.error_code, job.finished_at is not None) == ("succeeded", None, True)
    steps = [e.data["step"] for e in events_of(database, job_id) if e.type == "metrics"]
    assert steps == [1, 2, 3, 4, 5], "no step was taken twice"
    assert_whole(database, job_id)


def test_retried_job_has_all_its_attempts_again(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    """A cancel that came too late for the failure is forgotten with it, too."""
    stand_in(crash_at=2)
    settings.max_crashes = 2
    job_id = new_job()
    for expected in ("queued", "failed"):
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).status == expected
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(cancel_requested=True))
        job_requests.retry(session, job_id, None)
    for expected in ("queued", "failed"):
        run_job(database, settings, job_id, never)
        assert job_of(database, job_id).status == expected


def test_job_for_review_stops_after_generation_until_it_is_approved(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    job_id = new_job(review=True)
    run_job(database, settings, job_id, never)
    job = job_of(database, job_id)
    assert (job.status, job.lease_until, job.approved_at) == ("awaiting_review", None, None)
    (folder,) = (settings.data_dir / "runs" / job_id).glob("attempt-*")
    made = (folder / "preferences.jsonl").read_bytes()
    assert not any(e.type == "metrics" for e in events_of(database, job_id))
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "awaiting_review", "a bell does not approve it"
    with database.write() as session:
        job_requests.approve(session, job_id)
    run_job(database, settings, job_id, never)
    assert job_of(database, job_id).status == "succeeded"
    (folder,) = (settings.data_dir / "runs" / job_id).glob("attempt-*")
    assert (folder / "preferences.jsonl").read_bytes() == made, "what was approved is what was optimised on"
    skipped = [e.data["stage"] for e in events_of(database, job_id) if e.data.get("status") == "skipped"]
    assert skipped == ["generating"]
    assert_whole(database, job_id)


def test_time_of_stages_is_booked_over_all_attempts(
    database: Database, settings: Settings, new_job: NewJob, stand_in: Tell
) -> None:
    stand_in(steps=10, step_s=0.1, crash_at=6, crashes=1)
    job_id = new_job()
    run_job(database, settings, job_id, never)
    first = job_of(database, job_id).stage_seconds["optimizing"]
    run_job(database, settings, job_id, never)
    total = job_of(database, job_id).stage_seconds["optimizing"]
    assert 0.3 < first < total
    assert 0.9 < total < 10
