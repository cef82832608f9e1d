"""Shards of a generation, in this process: who may claim one, when a helper goes, what its end writes, and that no job waits for it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from hscr.artifacts import write_json
from service import backup, devices, job_requests, jobs, retention, run_folders, shards
from service.db import Database, now
from service.devices import Device, RunTurn
from service.events import ProgressEvent, StageEvent
from service.models import ApiKey, GenerationShard, Job
from service.queue import QUEUE, make_celery, ring, waiting_bells
from service.settings import Settings
from tests.conftest import alive, wait_for
from worker import help as helping
from worker import sweep
from worker.attempt import JobFolder
from worker.help import help_job
from worker.offer import MOST, SHORTEST_S, Offer
from worker.run import Run
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

Tell = Callable[..., None]
NewJob = Callable[..., str]
CONFIG = {"preference": {"batch_size": 1}}
BOUNDS = [(2, 1, 2), (3, 2, 3)]  # of the three records of `dataset`


def never() -> bool:
    return False


@pytest.fixture
def running(database: Database, settings: Settings, new_job: NewJob, stand_in: Tell) -> str:
    """A job that somebody runs: it has begun to generate, and offered two of its three records."""
    stand_in(record_s=0.01)
    job_id = new_job(config=CONFIG)
    begin(database, settings, job_id)
    return job_id


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that helpers start from here on."""
    started: list[Run] = []

    class Noted(Run):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(helping, "Run", Noted)
    return started


def begin(database: Database, settings: Settings, job_id: str) -> jobs.Claim:
    with database.write() as session:
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
        jobs.heartbeat(session, mine, 60, stage="generating", progress=at(0))
        shards.offer(session, job_id, 3, BOUNDS)
    write_json(JobFolder(settings.data_dir, job_id).path / "config.json", CONFIG)
    return mine


def at(done: int, stage: str = "generating") -> dict[str, Any]:
    return {"stage": stage, "done": done, "total": 3}


def set_job(database: Database, job_id: str, **values: Any) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


BASE = {"status": "running", "stage": "generating", "progress": at(0), "cancel_requested": False}
BASE |= {"pause_requested": False, "deadline_at": None, "finished_at": None}


def set_to(database: Database, job_id: str, values: dict[str, Any]) -> None:
    """The job as it was begun, but for these values."""
    set_job(database, job_id, **(BASE | {"lease_until": now() + timedelta(seconds=60)} | values))


def rows(database: Database, job_id: str) -> dict[int, GenerationShard]:
    with database.read() as session:
        return {s.number: s for s in session.scalars(select(GenerationShard).where(GenerationShard.job_id == job_id))}


def statuses(database: Database, job_id: str) -> dict[int, str]:
    return {number: shard.status for number, shard in rows(database, job_id).items()}


def claim(database: Database, job_id: str, lease_s: float = 60) -> shards.Claim | None:
    with database.write() as session:
        return shards.claim(session, job_id, lease_s, None)


def renewed(database: Database, mine: shards.Claim) -> bool:
    with database.write() as session:
        return shards.renew(session, mine, 60, None)


def parts(settings: Settings, job_id: str) -> list[Path]:
    return sorted((run_folders.folder(settings.data_dir, job_id) / "parts").glob("*"))


def test_a_helper_makes_all_shards_in_one_run_and_the_jobs_run_takes_them_up(
    database: Database, settings: Settings, running: str, runs: list[Run]
) -> None:
    help_job(database, settings, running, never)
    assert len(runs) == 1, "the model is loaded once"
    assert statuses(database, running) == {2: "done", 3: "done"}
    assert [p.name.split(".")[1] for p in parts(settings, running)] == ["1-2", "2-3"]
    with database.write() as session:
        held = session.get_one(Job, running)
        jobs.hand_back(session, jobs.Claim(running, held.fence), "test")
    run_job(database, settings, running, never)
    with database.read() as session:
        assert jobs.get(session, running).status == "succeeded"
        events = jobs.events_after(session, running, 0, 1000)
        assert [e.data["last"] for e in events if e.type == "part"] == [2, 3]
    assert not parts(settings, running), "what nobody needs any more is gone"


def test_shards_are_claimed_from_the_last_record_backwards_and_once(database: Database, running: str) -> None:
    first, second = claim(database, running), claim(database, running)
    assert first is not None
    assert second is not None
    assert (first.number, second.number, first.parts) == (3, 2, 3)
    assert claim(database, running) is None


def test_no_shard_is_claimed_of_a_job_that_has_no_use_for_it(database: Database, running: str) -> None:
    for values in (
        {"progress": at(2)},  # the run is there soon
        {"progress": at(3)},
        {"stage": "optimizing", "progress": at(0, "optimizing")},
        {"cancel_requested": True},
        {"pause_requested": True},
        {"deadline_at": now() - timedelta(seconds=1)},
        {"status": "paused", "lease_until": None},
        {"status": "queued", "lease_until": None},
        {"status": "failed", "lease_until": None, "finished_at": now()},
    ):
        set_to(database, running, values)
        with database.read() as session:
            assert shards.wanted(session, None) == [], values
        assert claim(database, running) is None, values
    set_to(database, running, {})
    assert claim(database, running) is not None


def test_no_shard_goes_before_a_job(database: Database, running: str, new_job: NewJob) -> None:
    waiting = new_job()
    with database.read() as session:
        assert shards.wanted(session, None) == []
    assert claim(database, running) is None
    with database.write() as session:
        job_requests.cancel(session, waiting)
    assert claim(database, running) is not None


def test_a_job_that_may_not_start_keeps_nobody_from_helping(database: Database, running: str, new_job: NewJob) -> None:
    """Its owner has as many running jobs as the key allows, so no idle worker could take it."""
    with database.write() as session:
        session.add(ApiKey(id="key_1", name="k", shown="s", digest="d", scopes=[], running_max=1))
    set_job(database, running, owner="key_1")
    new_job(owner="key_1")
    assert claim(database, running) is not None
    new_job(owner="other")
    assert claim(database, running) is None


def test_a_helper_learns_that_it_is_of_no_use(database: Database, running: str) -> None:
    mine = claim(database, running)
    assert mine is not None
    for values in (
        {"cancel_requested": True},
        {"pause_requested": True},
        {"status": "paused", "lease_until": None},
        {"status": "cancelled", "lease_until": None, "finished_at": now()},
        {"stage": "optimizing", "progress": at(0, "optimizing")},
        {"progress": at(3)},
    ):
        set_to(database, running, {"progress": at(2)})
        assert renewed(database, mine), "the run works on its records too: whoever is first has them"
        set_to(database, running, values)
        assert not renewed(database, mine), values


def test_a_helper_leaves_for_a_job_that_nobody_took(database: Database, running: str, new_job: NewJob) -> None:
    mine, waiting = claim(database, running), new_job()
    assert mine is not None
    set_job(database, waiting, queued_at=now() + timedelta(seconds=60))  # just now, however slow this machine is
    assert renewed(database, mine), "some worker may be idle"
    set_job(database, waiting, queued_at=now() - timedelta(seconds=2))
    assert not renewed(database, mine)


def test_a_helper_stays_while_the_job_changes_hands(database: Database, running: str) -> None:
    mine = claim(database, running)
    assert mine is not None
    with database.write() as session:
        jobs.hand_back(session, jobs.Claim(running, 1), "worker_stopping")
    assert renewed(database, mine)


def test_every_write_of_an_old_claim_is_refused(database: Database, running: str) -> None:
    old = claim(database, running, lease_s=-1)
    assert old is not None
    with database.write() as session:
        (seen,) = shards.lost(session)
        assert shards.reap(session, seen, 3) == "open"
    new = claim(database, running)
    assert new is not None
    assert (new.number, new.fence) == (old.number, old.fence + 1)
    before = rows(database, running)[old.number]
    writes: list[Callable[[Any], Any]] = [
        lambda s: shards.renew(s, old, 600, None),
        lambda s: shards.made(s, old),
        lambda s: shards.give_back(s, old),
        lambda s: shards.crash(s, old, 1),
    ]
    for write in writes:
        with pytest.raises(shards.Superseded), database.write() as session:
            write(session)
    after = rows(database, running)[old.number]
    assert (after.status, after.lease_until, after.crashes) == ("running", before.lease_until, 1)


def test_a_shard_that_was_renewed_or_taken_is_not_reaped(database: Database, running: str) -> None:
    mine = claim(database, running, lease_s=-1)
    assert mine is not None
    with database.read() as session:
        (seen,) = shards.lost(session)
    assert renewed(database, mine)
    with database.write() as session:
        assert shards.reap(session, seen, 3) is None
    assert statuses(database, running)[3] == "running"


def test_a_shard_whose_making_fails_is_left_to_the_run(
    database: Database, settings: Settings, running: str, stand_in: Tell
) -> None:
    stand_in(record_s=0, part_crash=[3])
    for expected in ("open", "open", "own"):
        help_job(database, settings, running, never)
        assert statuses(database, running) == {2: "open", 3: expected}
    stand_in(record_s=0)
    help_job(database, settings, running, never)
    assert statuses(database, running) == {2: "done", 3: "own"}


def test_a_run_that_dies_over_its_second_shard_costs_that_one_only(
    database: Database, settings: Settings, running: str, stand_in: Tell, runs: list[Run]
) -> None:
    stand_in(record_s=0, part_crash=[2])
    help_job(database, settings, running, never)
    assert {n: (s.status, s.crashes) for n, s in rows(database, running).items()} == {2: ("open", 1), 3: ("done", 0)}
    assert len(runs) == 1
    assert not alive(runs[0].pid)


@pytest.mark.parametrize("why", ["a job waits", "the worker stops", "the device is wanted"])
def test_a_helper_takes_no_further_shard_where_something_else_is_to_be_done(
    database: Database,
    settings: Settings,
    running: str,
    new_job: NewJob,
    runs: list[Run],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """It comes up right after the first was booked, so that no heartbeat has seen it."""
    booked, came = helping._Helping._book, list[str]()

    def book(self: helping._Helping) -> None:
        booked(self)
        came.append(new_job() if why == "a job waits" else why)

    monkeypatch.setattr(helping._Helping, "_book", book)
    monkeypatch.setattr(RunTurn, "must_go", lambda _: came == ["the device is wanted"])
    help_job(database, settings, running, lambda: came == ["the worker stops"])
    assert {n: (s.status, s.fence) for n, s in rows(database, running).items()} == {2: ("open", 0), 3: ("done", 1)}
    assert not alive(runs[0].pid)


def test_a_shard_of_a_helper_that_died_is_taken_back_by_the_sweep(database: Database, running: str) -> None:
    for expected in ("open", "open", "own"):
        assert claim(database, running, lease_s=-1) is not None
        assert sweep.reap_shards(database, 3) == 1
        assert statuses(database, running) == {2: "open", 3: expected}
    assert sweep.reap_shards(database, 3) == 0


def test_a_worker_that_stops_gives_its_shard_back_and_the_next_goes_on_behind_its_batches(
    database: Database, settings: Settings, running: str, stand_in: Tell, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.write_text("part")
    here = gate.with_suffix(".here")
    stand_in(record_s=0, hold=str(gate))
    help_job(database, settings, running, here.is_file)
    assert statuses(database, running) == {2: "open", 3: "open"}
    assert rows(database, running)[3].crashes == 0
    assert not alive(int(here.read_text()))
    (half,) = parts(settings, running)
    assert half.name.endswith(".2-3.partial")
    gate.unlink()
    help_job(database, settings, running, never)
    assert [p.name.split(".")[1] for p in parts(settings, running)] == ["1-2", "2-3"]


@pytest.mark.parametrize("wish", ["cancel", "pause", "other job"])
def test_a_helper_goes_within_seconds(
    database: Database, settings: Settings, running: str, stand_in: Tell, tmp_path: Path, new_job: NewJob, wish: str
) -> None:
    gate = tmp_path / "gate"
    gate.write_text("part")
    here = gate.with_suffix(".here")
    stand_in(record_s=0, hold=str(gate))
    helper = threading.Thread(target=help_job, args=(database, settings, running, never))
    helper.start()
    wait_for(here.is_file, 20, "the helper works")
    if wish == "other job":
        new_job()
    else:
        with database.write() as session:
            getattr(job_requests, wish)(session, running)
    helper.join(6)
    assert not helper.is_alive()
    assert statuses(database, running) == {2: "open", 3: "open"}
    assert not alive(int(here.read_text()))


def test_no_folder_goes_while_somebody_helps_in_it(
    database: Database, settings: Settings, running: str, stand_in: Tell
) -> None:
    with run_folders.helping(settings.data_dir, running) as lock:
        assert lock is not None
        set_job(database, running, status="failed", lease_until=None, finished_at=now())
        assert not retention.free(database, settings.data_dir, running)
        with run_folders.helping(settings.data_dir, running) as other:
            assert other is not None, "many may help"
    assert retention.free(database, settings.data_dir, running)
    with run_folders.helping(settings.data_dir, running) as lock:
        assert lock is None
    assert not run_folders.folder(settings.data_dir, running).exists()


def test_nobody_helps_in_a_folder_that_is_being_put_aside(
    settings: Settings, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed between the helper's look for the lock's file and its lock: the lock is of a folder that is no more."""
    path = run_folders.folder(settings.data_dir, running)
    flock = run_folders.fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if path.exists():
            shutil.move(path, path.with_name(".gone-1"))
        flock(descriptor, how)

    monkeypatch.setattr(run_folders.fcntl, "flock", late)
    with run_folders.helping(settings.data_dir, running) as lock:
        assert lock is None
    assert not path.exists()


def test_a_host_without_the_jobs_folder_does_not_help(database: Database, settings: Settings, running: str) -> None:
    settings.data_dir = settings.data_dir / "elsewhere"
    help_job(database, settings, running, never)
    assert rows(database, running)[3].fence == 0
    assert not run_folders.folder(settings.data_dir, running).exists()


@pytest.mark.parametrize(("policy", "helps"), [("share", True), ("serve_first", False), ("train_first", False)])
def test_a_helper_drives_no_engine_from_its_device(
    database: Database, settings: Settings, running: str, policy: str, helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.device_policy = policy  # type: ignore[assignment]
    raised: list[str] = []
    flag = Device.flag

    def seen(device: Device, what: str, **options: Any) -> Any:
        raised.append(what)
        return flag(device, what, **options)

    with Device.of(settings).flag(devices.SERVING):
        monkeypatch.setattr(Device, "flag", seen)
        help_job(database, settings, running, never)
    assert (statuses(database, running)[3] == "done") == helps
    assert not (policy == "train_first" and raised), "the engine would have gone"
    help_job(database, settings, running, never)
    assert statuses(database, running)[3] == "done", "the device is free"


def test_helping_can_be_switched_off(database: Database, settings: Settings, running: str, valkey: str) -> None:
    settings.share_generation, settings.redis_url = False, valkey
    help_job(database, settings, running, never)
    assert sweep.call_helpers(database, make_celery(settings), settings) == 0
    assert statuses(database, running) == {2: "open", 3: "open"}


def test_deleted_job_takes_its_shards_along(database: Database, settings: Settings, running: str) -> None:
    set_job(database, running, status="failed", lease_until=None, finished_at=now())
    with database.write() as session:
        assert retention.delete_job(session, running)
    assert rows(database, running) == {}


def test_backup_leaves_parts_out(database: Database, settings: Settings, running: str, tmp_path: Path) -> None:
    help_job(database, settings, running, never)
    assert parts(settings, running)
    set_job(database, running, status="paused", lease_until=None)
    with run_folders.helping(settings.data_dir, running):  # one that still works keeps no backup from being made
        backup.backup(settings, tmp_path / "out")
    copied = tmp_path / "out" / "data" / "runs" / running
    assert {p.name for p in copied.iterdir()} == {"config.json", "helpers.log"}


def test_helpers_are_called_while_shards_are_open_and_no_bell_waits(
    database: Database, settings: Settings, running: str, valkey: str, new_job: NewJob
) -> None:
    settings.redis_url = valkey
    celery = make_celery(settings)
    assert sweep.call_helpers(database, celery, settings) == 2
    assert waiting_bells(celery) == 2
    assert sweep.call_helpers(database, celery, settings) == 0, "nobody is idle"
    with celery.connection_for_read() as connection:
        connection.default_channel.client.delete(QUEUE)
    ring(celery, running)
    assert sweep.call_helpers(database, celery, settings) == 0, "bells of jobs come first"
    with celery.connection_for_read() as connection:
        connection.default_channel.client.delete(QUEUE)
    new_job()
    assert sweep.call_helpers(database, celery, settings) == 0, "so do jobs"


def test_shards_are_offered_once(database: Database, running: str) -> None:
    assert claim(database, running) is not None
    with database.write() as session:
        shards.offer(session, running, 5, [(5, 2, 3)])
    assert statuses(database, running) == {2: "open", 3: "running"}
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(GenerationShard)) == 2


def progress(done: int, eta_s: float | None, total: int = 100) -> ProgressEvent:
    return ProgressEvent(stage="generating", done=done, total=total, rate=1.0, eta_s=eta_s)


def offered(*events: Any, start_s: float = 1.9, worth: float = 4.0, batch_size: int = 10) -> Offer:
    offer = Offer(batch_size, worth)
    offer._began -= start_s
    for event in events:
        offer.take(event)
    return offer


def test_shards_by_hand() -> None:
    """10 of 100 records took 4 s, so that all take 40 and what is left 36; the start took 2 s, and 4 of those are less.

    A part is one of ten batches; the first two are the run's own.
    """
    offer = offered(StageEvent(stage="generating", status="started"), progress(0, None), progress(10, 36))
    assert offer.parts == 10
    assert offer.bounds == [(n, 10 * n - 10, 10 * n) for n in range(3, 11)]


def test_parts_are_not_too_short_to_be_worth_claiming() -> None:
    """100 batches of one record, 40 s in all: as many parts as that has fifths of a second, but not more than MOST; so for 10 s."""
    assert offered(progress(0, None), progress(10, 36), batch_size=1).parts == MOST
    assert offered(progress(0, None), progress(10, 9), batch_size=1).parts == int(10 / SHORTEST_S) == 50


def test_a_resumed_run_offers_what_lies_before_it() -> None:
    """It begins at 50 and is at 60; 4 s for each 10 as above."""
    assert offered(progress(50, None), progress(60, 16)).bounds == [(8, 70, 80), (9, 80, 90), (10, 90, 100)]


@pytest.mark.parametrize(
    ("events", "parts", "shards"),
    [
        ([progress(0, None)], 0, 0),  # nobody knows yet
        ([progress(0, None), progress(0, None)], 0, 0),
        ([progress(0, None), progress(10, 7)], 1, 0),  # not worth it
        ([progress(0, None), progress(10, 1e6)], 10, 8),  # never more than batches, and the run begins the second one
        ([progress(0, None, 10_000), progress(10, 1e6, 10_000)], MOST, MOST - 1),
    ],
)
def test_what_is_worth_sharing(events: list[ProgressEvent], parts: int, shards: int) -> None:
    assert (offered(*events).parts, len(offered(*events).bounds)) == (parts, shards)
