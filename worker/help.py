"""Helping with a running job's generation: an idle worker makes its shards, one after the other, and goes as soon as it is of no use.

One run makes them all, told each on its standard input, so that the model is loaded once. What it makes is a file named by its content
beside the run's folder (hscr/parts.py), so nothing that comes late or twice does harm. It is killed, not asked, when it must go: batches
that are done lie on the disk, and whoever has the shard next goes on behind them.
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
from service.events import ErrorEvent, StageEvent
from service.models import Job
from service.settings import Settings
from worker.carry import Interrupted, carry
from worker.command import parts_command, sources_of
from worker.fits import check_fits
from worker.room import has_room
from worker.run import Run

log = logging.getLogger("hscr.worker")
TICK_S = 0.1
MADE, GIVEN_BACK = "made", "given back"
_too_large: set[str] = set()  # jobs whose run does not fit on this process's device


def help_job(database: Database, settings: Settings, job_id: str, should_stop: Callable[[], bool]) -> None:
    """Make shards of a job's generation until none is left, or something else is to be done. A bell too many costs milliseconds."""
    try:
        if settings.share_generation and not should_stop():
            _help(database, settings, job_id, should_stop)
    except shards.Superseded:
        log.warning("job %s: a shard was taken away", job_id)
    except DBAPIError as error:
        log.warning("job %s: no help, the database does not answer: %s", job_id, type(error).__name__)
    finally:
        tracing.flush()


def _help(database: Database, settings: Settings, job_id: str, should_stop: Callable[[], bool]) -> None:
    if job_id in _too_large or not has_room(settings):
        return
    with database.read() as session:
        if job_id not in shards.wanted(session, settings.key_running_max):
            return  # nobody else need leave the device for it
    with devices.for_helper(settings) as turn, run_folders.helping(settings.data_dir, job_id) as lock:
        if turn is None or lock is None:
            return
        with database.write() as session:
            first = shards.claim(session, job_id, settings.lease_s, settings.key_running_max)
        if first is None:
            return
        with logs.bound(job_id=job_id), tracing.span("job.help", job_id=job_id) as span:
            helping = _Helping(database, settings, first, should_stop, turn, lock)
            helping.run()
            span.set(ended=helping.ended, made=helping.made)


@dataclass
class _Helping:
    """One run that makes shard after shard; `mine` is the one that it is told to make now."""

    database: Database
    settings: Settings
    mine: shards.Claim
    should_stop: Callable[[], bool]
    turn: RunTurn
    lock: int
    ended: str = ""
    made: int = 0
    error: ErrorEvent | None = None
    _of_use: bool = True
    _renewed: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Make shards, and end each claim in exactly one way: made, given back, or a crash."""
        try:
            with ExitStack() as lent:
                self.ended = self._follow(self._started(lent))
        except (shards.Superseded, DBAPIError):
            raise  # the sweep takes back what is still claimed
        except Interrupted:
            self.ended = GIVEN_BACK
        except Problem as problem:
            if problem.code == "device_too_small":
                _too_large.add(self.mine.job_id)
            self.ended = problem.code
        except Exception as error:
            # Its type and place only (service/logs.py): an exception's text may name a file.
            log.exception("job %s: helping failed", self.mine.job_id)
            self.ended = type(error).__name__
        log.info("job %s: shard %d ended: %s; made: %d", self.mine.job_id, self.mine.number, self.ended, self.made)
        if self.ended == GIVEN_BACK:
            self._finish(lambda s: shards.give_back(s, self.mine))
        elif self.ended != MADE:
            self._finish(lambda s: shards.crash(s, self.mine, self.settings.max_crashes))

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
        command = parts_command(self.settings, folder, sources, at)
        device = [] if self.turn.descriptor is None else [self.turn.descriptor]
        return Run(
            command,
            folder / "helpers.log",
            threads=self.settings.run_threads,
            features=self.settings.features_folder,
            inherit=[self.lock, *device],
            fed=True,
        )

    def _follow(self, run: Run) -> str:
        """Tell the run one shard after the other until no more is to be made, or it has ended; how it was."""
        try:
            self._tell(run)
            while (status := run.ended()) is None:
                if self._read(run) and not self._next(run):
                    return MADE  # what it would do now is nothing: it is killed, as always
                if self._must_go():
                    run.kill()  # before anybody else has the shard
                    return GIVEN_BACK
                run.wait(TICK_S)
            if self._read(run):  # its last word
                self._book()
                return MADE
        finally:
            run.close()
        return self.error.code if self.error else f"status_{status}"

    def _tell(self, run: Run) -> None:
        log.info("job %s: making shard %d of %d", self.mine.job_id, self.mine.number, self.mine.parts)
        run.tell(f"{self.mine.number}/{self.mine.parts}")

    def _read(self, run: Run) -> bool:
        """Whether the shard is made. Its progress is nobody's business; what it says last of why it fails is."""
        made = False
        for event in run.poll():
            self.error = event if isinstance(event, ErrorEvent) else self.error
            made = made or (isinstance(event, StageEvent) and event.status != "started")
        return made

    def _next(self, run: Run) -> bool:
        """Book the shard that was made, and have the run go on with another one; False where there is none for it."""
        self._book()
        if self.should_stop() or self.turn.must_go() or not has_room(self.settings):
            return False
        with self.database.write() as session:
            other = shards.claim(session, self.mine.job_id, self.settings.lease_s, self.settings.key_running_max)
        if other is None:
            return False
        self.mine, self._renewed = other, time.monotonic()
        self._tell(run)
        return True

    def _book(self) -> None:
        self._finish(lambda s: shards.made(s, self.mine))
        self.made += 1

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

    def _finish(self, write: Callable[[Session], object]) -> None:
        """The last write of a claim; tried again while the lease lasts, then the sweep takes the shard back."""
        until = time.monotonic() + self.settings.lease_s
        while True:
            try:
                with self.database.write() as session:
                    write(session)
                return
            except DBAPIError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
