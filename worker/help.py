"""Helping with a running job's generation: an idle worker makes its shards, one after the other, and goes as soon as it is of no use.

What it makes is a file named by its content beside the run's folder (hscr/parts.py), so nothing that comes late or twice does harm. Its run
is killed, not asked, when it must go: batches that are done lie on the disk, and whoever has the shard next goes on behind them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service import devices, logs, run_folders, shards, tracing
from service.artifact_store import ADAPTERS, Artifact, open_store
from service.db import Database
from service.devices import RunTurn
from service.errors import Problem
from service.events import ErrorEvent
from service.models import Job
from service.settings import Settings
from worker.carry import Interrupted, carry
from worker.command import part_command, sources_of
from worker.fits import check_fits
from worker.room import has_room
from worker.run import DONE, Run

log = logging.getLogger("hscr.worker")
TICK_S = 0.1
_too_large: set[str] = set()  # jobs whose run does not fit on this process's device


def help_job(database: Database, settings: Settings, job_id: str, should_stop: Callable[[], bool]) -> None:
    """Make shards of a job's generation until none is left, or something else is to be done. A bell too many costs milliseconds."""
    try:
        while settings.share_generation and not should_stop() and _one(database, settings, job_id, should_stop):
            pass
    except shards.Superseded:
        log.warning("job %s: a shard was taken away", job_id)
    except DBAPIError as error:
        log.warning("job %s: no help, the database does not answer: %s", job_id, type(error).__name__)
    finally:
        tracing.flush()


def _one(database: Database, settings: Settings, job_id: str, should_stop: Callable[[], bool]) -> bool:
    """Make one shard; whether another one may be asked for."""
    if job_id in _too_large or not has_room(settings):
        return False
    with database.read() as session:
        if job_id not in shards.wanted(session, settings.key_running_max):
            return False  # nobody else need leave the device for it
    with devices.for_helper(settings) as turn, run_folders.helping(settings.data_dir, job_id) as lock:
        if turn is None or lock is None:
            return False
        with database.write() as session:
            mine = shards.claim(session, job_id, settings.lease_s, settings.key_running_max)
        if mine is None:
            return False
        with logs.bound(job_id=job_id), tracing.span("job.shard", job_id=job_id, shard=mine.number) as span:
            helping = _Helping(database, settings, mine, should_stop, turn, lock)
            helping.run()
            span.set(ended=helping.ended)
        return helping.ended == "made"


@dataclass
class _Helping:
    database: Database
    settings: Settings
    mine: shards.Claim
    should_stop: Callable[[], bool]
    turn: RunTurn
    lock: int
    ended: str = ""
    error: ErrorEvent | None = None
    _of_use: bool = True
    _renewed: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Make the shard, and end the claim in exactly one way: made, given back, or a crash."""
        log.info("job %s: making shard %d of %d", self.mine.job_id, self.mine.number, self.mine.parts)
        try:
            with ExitStack() as lent:
                self.ended = self._follow(self._started(lent))
        except shards.Superseded:
            raise
        except Interrupted:
            self.ended = "given back"
        except Problem as problem:
            if problem.code == "device_too_small":
                _too_large.add(self.mine.job_id)
            self.ended = problem.code
        except Exception as error:
            # Its type and place only (service/logs.py): an exception's text may name a file.
            log.exception("job %s: helping failed", self.mine.job_id)
            self.ended = type(error).__name__
        log.info("job %s: shard %d ended: %s", self.mine.job_id, self.mine.number, self.ended)
        self._finish()

    def _started(self, lent: ExitStack) -> Run:
        """The run, on data and parent as they lie on this disk; where the store is away the shard is left to others."""
        with self.database.read() as session:
            job = session.get_one(Job, self.mine.job_id)
            sources = sources_of(session, job)
        store, at = open_store(self.settings), dict[Artifact, Path]()
        for artifact in sources.to_generate():
            check = artifact.kind == ADAPTERS
            held = self._carry(lambda a=artifact, c=check: lent.enter_context(store.lent(a, check=c)))  # type: ignore[misc]
            at[artifact] = held.resolve()
        if devices.is_accelerator(self.settings) and self.turn.must_fit():
            check_fits(self.settings, at[sources.data], None, job.config, tend=self._must_go)
        folder = run_folders.folder(self.settings.data_dir, self.mine.job_id)
        command = part_command(self.settings, folder, sources, at, self.mine.number, self.mine.parts)
        device = [] if self.turn.descriptor is None else [self.turn.descriptor]
        return Run(
            command,
            folder / "helpers.log",
            threads=self.settings.run_threads,
            features=self.settings.features_folder,
            inherit=[self.lock, *device],
        )

    def _follow(self, run: Run) -> str:
        """Wait for the run's end; how it was."""
        try:
            while (status := run.ended()) is None:
                self._read(run)
                if self._must_go():
                    run.kill()
                    return "given back"
                time.sleep(TICK_S)
            self._read(run)
        finally:
            run.close()
        if status == DONE:
            return "made"
        return self.error.code if self.error else f"status_{status}"

    def _read(self, run: Run) -> None:
        """Its progress is nobody's business; what it says last of why it fails is."""
        for event in run.poll():
            self.error = event if isinstance(event, ErrorEvent) else self.error

    def _must_go(self) -> bool:
        self._beat()
        return not self._of_use or self.should_stop() or self.turn.must_go() or not has_room(self.settings)

    def _beat(self) -> None:
        """Renew the lease, and see whether the shard is still of use. Raises Superseded, also where a whole lease was lost."""
        since = time.monotonic() - self._renewed
        if since < min(1.0, self.settings.lease_s / 3):
            return
        try:
            with self.database.write() as session:
                self._of_use = shards.renew(session, self.mine, self.settings.lease_s, self.settings.key_running_max)
        except DBAPIError:
            if since > self.settings.lease_s:
                raise shards.Superseded(self.mine.job_id) from None
            time.sleep(0.5)
            return
        self._renewed = time.monotonic()

    def _carry(self, work: Callable[[], Path]) -> Path:
        """Work of the store's, with a lease that goes on. Raises Problem, Interrupted."""
        return carry(work, self._must_go, wait_s=0, grace_s=0)

    def _finish(self) -> None:
        """The last write of this claim; tried again while the lease lasts, then the sweep takes the shard back."""
        until = time.monotonic() + self.settings.lease_s
        while True:
            try:
                with self.database.write() as session:
                    self._write(session)
                return
            except DBAPIError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def _write(self, session: Session) -> None:
        if self.ended == "made":
            shards.made(session, self.mine)
        elif self.ended == "given back":
            shards.give_back(session, self.mine)
        else:
            shards.crash(session, self.mine, self.settings.max_crashes)
