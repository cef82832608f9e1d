"""Random requests and random faults against real processes (a Hypothesis state machine), and after each case the invariants.

Short here, long by `make chaos N=1000`. Most jobs run the stand-in, some the real optimiser on a tiny model.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, strategies
from hypothesis import settings as chaos_settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from sqlalchemy import func, select

from service import jobs, retention
from service.archive import ArchiveLimits
from service.datasets import import_upload
from service.db import Database, upgrade
from service.models import GenerationShard, Job, JobEvent
from service.settings import Settings
from tests.chaos.children import started
from tests.chaos.invariants import check, orphans
from tests.chaos.points import POINTS
from tests.chaos.postgres import Postgres
from tests.chaos.proxy import MODES
from tests.chaos.rig import WORKERS, Rig, table
from tests.chaos.run import LONG, SHARED
from tests.conftest import dataset_zip, wait_for
from tests.small_disk import small_disk
from tests.worker.test_celery import ROOT

STEPS = int(os.environ.get("HSCR_CHAOS_STEPS", "5"))
ROUND = 5 if STEPS < 100 else 20
# One job in so many is a real run: about a hundred in the long form.
REAL_EVERY = 12 if STEPS < 100 else max(2, min(8, STEPS // 110))
MANY = 16  # records of a job of which a worker without a job makes parts
STILL_S = 60  # peace is broken where for so long nothing moves
DISK_MB = 96
REAL = {
    "preference": {"similarity": "token_f1", "batch_size": 1},
    "optimization": {"lr": 0.01, "epochs": 2, "batch_size": 1, "checkpoint_every": 2},
}
pick = strategies.integers(0, 10**6)
WHILE_IT_RUNS = ("run started", "optimizing")
soon = strategies.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])


class Chaos(RuleBasedStateMachine):
    """One service under fire. A request that was not answered is sent again with its key, as a careful client would."""

    rig: ClassVar[Rig]
    stand_in: ClassVar[tuple[str, str]]  # of three records, and of those that are worth sharing
    real: ClassVar[tuple[str, str]]  # to align on, to evaluate on
    accepted: ClassVar[dict[str, str]]
    checked: ClassVar[list[float]]

    @initialize(how=strategies.sampled_from(["kill run", "kill supervisor", "freeze supervisor", "freeze", "kill all"]))
    def lose_a_helper(self, how: str) -> None:
        """Each case begins with a job that both workers share, for later one is seldom idle; `kill all`: its own worker is lost too."""
        self._submit(self._key(), shared=True)
        family = self.rig.await_helper(6.0)
        if family and how == "kill all":
            self.rig.note("kill all of a helper")
            self.rig.kill_below(2)
            self.rig.kill_below(1)
        elif family:
            self.rig.lose(family, how)

    @rule(wait=soon, times=strategies.integers(1, 3))
    def submit(self, wait: float, times: int) -> None:
        key = self._key()
        for _ in range(times):
            self._submit(key)
        time.sleep(wait)

    @rule(which=pick, verb=strategies.sampled_from(["cancel", "pause", "pause", "resume", "retry"]), wait=soon)
    def wish(self, which: int, verb: str, wait: float) -> None:
        """About one of the newest jobs: it may wait, run or have ended."""
        self._work(wait)
        job_id = list(self.accepted.values())[-1 - which % min(3, len(self.accepted))]
        assert ask("POST", f"/jobs/{job_id}/{verb}").status_code in (202, 409)

    @rule(which=pick, wait=soon)
    def kill(self, which: int, wait: float) -> None:
        """kill -9 of a part, or all that the broker holds is gone."""
        self._work(wait)
        ways = (*self.rig.parts, "flush")
        self.rig.flush() if ways[which % len(ways)] == "flush" else self.rig.kill(ways[which % len(ways)])

    @rule(generation=strategies.sampled_from([1, 2]), wait=soon)
    def kill_below_the_worker(self, generation: int, wait: float) -> None:
        self._work(wait)
        self.rig.kill_below(generation)

    @rule(
        point=strategies.sampled_from(POINTS),
        victim=strategies.sampled_from(["supervisor", "supervisor", "run", *WORKERS]),
    )
    def kill_at(self, point: str, victim: str) -> None:
        """Right after a write point that few random faults would meet."""
        self._submit(self._key())
        self.rig.await_point(point, 2.0)
        if victim in WORKERS:
            self.rig.kill(victim)
        else:
            self.rig.kill_below(1 if victim == "supervisor" else 2)

    @rule(which=pick, seconds=strategies.sampled_from([0.2, 1.0, 3.0]), wait=soon)
    def freeze(self, which: int, seconds: float, wait: float) -> None:
        """The longest is twice a lease: another worker has the job by then, and the frozen one does not know it."""
        self._work(wait)
        parts = (*self.rig.parts, *WORKERS, "runs")
        self.rig.freeze(parts[which % len(parts)], seconds)

    @rule(point=strategies.sampled_from((*POINTS, *WHILE_IT_RUNS, *WHILE_IT_RUNS)))
    def freeze_at(self, point: str) -> None:
        """A supervisor asleep for longer than its lease, its run awake: whoever has the job next must not run it beside that one."""
        self._submit(self._key(), long=True)
        self.rig.freeze_supervisors(self.rig.await_point(point, 3.0), 3.0)

    @rule(which=pick, mode=strategies.sampled_from(MODES), seconds=strategies.sampled_from([0.3, 1.0, 3.0]), wait=soon)
    def spoil(self, which: int, mode: str, seconds: float, wait: float) -> None:
        """What follows happens while the network is bad."""
        self._work(wait)
        self.rig.spoil(which, mode, seconds)

    @precondition(lambda self: self.rig.disk is not None)
    @rule(seconds=strategies.sampled_from([0.3, 1.0, 2.0]), wait=soon)
    def fill_the_disk(self, seconds: float, wait: float) -> None:
        self._work(wait)
        self.rig.fill_disk(seconds)

    def teardown(self) -> None:
        begin = time.monotonic()
        peace(self.rig, self.accepted)
        rig, data = self.rig, self.rig.settings.data_dir
        wait_for(lambda: not orphans(data, rig.real_pid), 10, f"no run is left: {orphans(data, rig.real_pid)}")
        wait_for(lambda: not claimed(rig.database), 10, "shards that nobody takes back")
        retention.collect(rig.database, data)  # what a killed publisher left, as the sweep would
        check(rig.database, data, rig.witness, self.accepted)
        self.checked.append(time.monotonic() - begin)

    def _key(self) -> str:
        return f"k{len(self.accepted)}"

    def _submit(self, key: str, *, long: bool = False, shared: bool = False) -> None:
        body: dict[str, Any] = {"dataset": self.stand_in[0], "adapter": "brain", "seed": LONG if long else 0}
        if shared:
            body |= {"dataset": self.stand_in[1], "seed": SHARED, "preference": {"batch_size": 1}}
        if int(key[1:]) % REAL_EVERY == 1 and not (long or shared):
            evaluation = {"dataset": self.real[1], "n_bootstrap": 100, "max_new_tokens": 2}
            body = {"dataset": self.real[0], "adapter": "real", **REAL, "evaluation": evaluation}
        answer = ask("POST", "/align", body, {"Idempotency-Key": key})
        assert answer.status_code == 202, answer.text
        assert self.accepted.setdefault(key, answer.json()["id"]) == answer.json()["id"]

    def _work(self, wait: float) -> None:
        """A fault finds something under way: at least a job that was just asked for."""
        self._submit(self._key())
        time.sleep(wait)


def ask(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer, whatever the API had to go through for it."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            answer = Chaos.rig.http.request(method, path, json=body, headers=headers)
            if answer.status_code < 500 and answer.json().get("code") != "idempotency_in_flight":
                return answer
        Chaos.rig.keep()
        time.sleep(0.1)
    raise AssertionError("the API did not come back")


def peace(rig: Rig, accepted: dict[str, str]) -> None:
    """The network heals, paused jobs go on, those that found no room on the disk are retried, and all jobs end."""
    rig.proxy.heal()
    with rig.database.read() as session:
        open_ = session.scalars(select(Job.id).where(Job.status.not_in(jobs.ENDED))).all()
        full = session.scalars(select(Job.id).where(Job.status == "failed", Job.error_code == "disk_full")).all()
    for job_id in open_:
        ask("POST", f"/jobs/{job_id}/resume")
    for job_id in full:
        ask("POST", f"/jobs/{job_id}/retry")
    assert set(accepted.values()) >= set(open_), "a job that nobody was told of"
    moved, seen = time.monotonic(), (-1, -1)
    while True:
        with rig.database.read() as session:
            left = session.scalar(select(func.count()).where(Job.status.not_in(jobs.ENDED))) or 0
            now = (left, session.scalar(select(func.sum(Job.last_seq))) or 0)
        if left == 0:
            return
        rig.keep()
        moved, seen = (moved, seen) if now == seen else (time.monotonic(), now)
        assert time.monotonic() - moved < STILL_S, f"{left} jobs never end"
        time.sleep(0.1)


def claimed(database: Database) -> int:
    """Shards that somebody has, or had when it died."""
    with database.read() as session:
        return session.scalar(select(func.count()).where(GenerationShard.status == "running")) or 0


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A tiny model, a tiny data set, and the process that forks real runs."""
    from tests.hscr.tiny import save_records, save_tiny_llava

    here = tmp_path_factory.mktemp("real")
    model = save_tiny_llava(here / "tiny")
    folders = save_records(here / "data", 3), save_records(here / "evaluation", 1, first=50)
    socket = here / "socket"
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.chaos.real_runs", str(socket), str(folders[0]), "--eval", str(folders[1])]
    command += ["--model", str(model), "--out", str(here / "first"), "--events", "json"]
    command += ["-s", "preference.similarity=token_f1", "-s", "evaluation.n_bootstrap=100"]
    server = started(command, here / "log", cwd=ROOT, env=environment)
    yield {"model": model, "folders": folders, "socket": socket, "pid": server.pid}
    server.kill()
    server.wait()


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=pytest.mark.thorough), "postgresql"])
def test_nothing_is_lost_whatever_dies(kind: str, tmp_path: Path, real_runs: dict[str, Any]) -> None:
    log = tmp_path / "processes.log"
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "data", DISK_MB))
        postgres = Postgres(log) if kind == "postgresql" else None
        if postgres is not None:
            stack.callback(postgres.close)
            postgres.start()
        settings = Settings(
            data_dir=tmp_path / "data", database_url=postgres.url() if postgres else "", disk_reserve_bytes=2**20
        )
        upgrade(settings.database)
        database = Database(settings.database)
        stack.callback(database.close)
        limits = ArchiveLimits(2**24, 100)
        made = (
            import_upload(database, settings.data_dir, io.BytesIO(dataset_zip(n)), f"of {n}", limits, 100)[0]
            for n in (3, MANY)
        )
        Chaos.stand_in = next(made).id, next(made).id
        stored = [
            import_upload(database, settings.data_dir, zipped(f), f.name, limits, 100)[0] for f in real_runs["folders"]
        ]
        Chaos.real = (stored[0].id, stored[1].id)
        told = {"HSCR_MODEL": str(real_runs["model"]), "CHAOS_REAL": stored[0].digest.replace(":", "-")}
        told["CHAOS_REAL_SOCKET"] = str(real_runs["socket"])
        Chaos.accepted, Chaos.checked = {}, []
        Chaos.rig = Rig(settings, tmp_path, postgres, disk, told, real_runs["pid"])
        stack.callback(Chaos.rig.close)
        Chaos.rig.wait_ready()
        begin = time.monotonic()
        try:
            run_state_machine_as_test(
                Chaos,
                settings=chaos_settings(
                    max_examples=max(1, STEPS // ROUND),
                    stateful_step_count=ROUND,
                    deadline=None,
                    phases=[Phase.generate],  # a fault's timing cannot be replayed, so nothing can be shrunk
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            print(summary(kind, time.monotonic() - begin, disk is not None), flush=True)
        assert Chaos.accepted
        settings.keep_runs_s = 0
        while retention.clean(database, settings):
            pass
        assert not list((settings.data_dir / "runs").iterdir()), "a file that nothing would ever remove"


def summary(kind: str, seconds: float, disk: bool) -> str:
    """What was done and what came of it, for people and for docs/reliability.md."""
    database = Chaos.rig.database
    with database.read() as session:
        ended = dict(session.execute(select(Job.status, func.count()).group_by(Job.status)).all())
        attempts = session.scalar(select(func.sum(Job.attempts)))
        real = session.execute(
            select(func.count(), func.sum(Job.attempts)).where(Job.adapter_name == "real", Job.status == "succeeded")
        ).one()
        shards = dict(
            session.execute(select(GenerationShard.status, func.count()).group_by(GenerationShard.status)).all()
        )
        claims = session.scalar(select(func.sum(GenerationShard.fence)))
        taken = session.scalar(select(func.count()).where(JobEvent.type == "part"))
    lines = [
        f"{kind}: {len(Chaos.checked)} cases, {sum(Chaos.rig.faults.values())} faults, {seconds:.0f} s",
        f"  jobs by status {ended}, attempts {attempts}; real runs that succeeded {real[0]}, their attempts {real[1]}",
        f"  shards by status {shards}, claimed {claims} times, parts taken up {taken}",
        "  disk: a tmpfs that was filled" if disk else "  no small disk could be mounted: it was never full",
    ]
    return "\n".join([*lines, table(Chaos.rig.faults)])


def zipped(folder: Path) -> io.BytesIO:
    from tests.service.test_real_run import zipped as bytes_of

    return io.BytesIO(bytes_of(folder))
