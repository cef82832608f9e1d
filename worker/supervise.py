"""One attempt at a job: claim, start the run, relay its events, and end the job's attempt in exactly one way.

Every write carries the fencing token. A supervisor that lost its lease, or cannot reach the database until the lease has run out, kills its
run and writes nothing more; the sweep gives the job to somebody else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from hscr.disk import is_full
from service import devices, gates, jobs, logs, promotion, shards, tracing
from service.artifact_store import ADAPTERS, Artifact, ArtifactStore, open_store
from service.db import Database, now
from service.devices import RunTurn
from service.errors import Problem
from service.evaluations import KIND
from service.events import CheckpointEvent, ErrorEvent, MetricsEvent, ProgressEvent, ResultEvent, RunEvent, StageEvent
from service.models import Job
from service.retention import artifacts_held
from service.run_folders import try_lock
from service.settings import Settings
from worker.attempt import JobFolder
from worker.carry import Interrupted, carry
from worker.command import Order, order_of, sources_of
from worker.fits import check_fits
from worker.offer import Offer
from worker.publishing import AdapterDamaged, learnt, store_made
from worker.room import CODE as DISK_FULL
from worker.room import MESSAGE as DISK_FULL_MESSAGE
from worker.room import has_room
from worker.run import BAD_INPUT, DONE, STOPPED, Run
from worker.stages import Stages

log = logging.getLogger("hscr.worker")
TICK_S = 0.1
Result = TypeVar("Result")
_HANDED_BACK = {
    "stop": "worker_stopping",
    "pause": "resumed",
    "device": "device_wanted",
}  # why asked -> the event's reason


def run_job(database: Database, settings: Settings, job_id: str, should_stop: Callable[[], bool]) -> None:
    """Work on a job if it is there to be claimed; returns when this attempt is over. A bell too many costs milliseconds."""
    try:
        if not has_room(
            settings
        ):  # left in the queue: the sweep rings again, and a job is not failed for its neighbours' files
            log.warning("job %s: not claimed, the data folder has less free than HSCR_DISK_RESERVE_BYTES", job_id)
            return
        with database.read() as session:
            if not jobs.waits(session, job_id):
                return  # nobody else need leave the device for it
        with devices.for_run(settings) as turn:
            if turn is None:
                log.info("job %s: not claimed, the device is in use", job_id)  # the sweep rings again
                return
            _attempt(database, settings, job_id, turn, should_stop)
    except jobs.Superseded:
        log.warning("job %s: superseded", job_id)
    finally:
        tracing.flush()  # not while it works: a collector that is away would hold up its lease


def _attempt(
    database: Database, settings: Settings, job_id: str, turn: RunTurn, should_stop: Callable[[], bool]
) -> None:
    with database.write() as session:
        mine = jobs.claim(session, job_id, settings.lease_s, settings.key_running_max)
    if mine is None:
        return
    n = mine.fence
    with logs.bound(job_id=job_id, attempt=n), tracing.span("job.attempt", job_id=job_id, attempt=n) as span:
        log.info("job %s attempt %d: claimed", job_id, n)
        attempt = _Attempt(database, settings, mine, should_stop, turn)
        attempt.run()
        span.set(ended=attempt.ended)


class DeviceBusy(Exception):
    """The engine did not leave the device in time."""


@dataclass
class _Asked:
    """Why the run is being stopped: cancel, pause, stop (the worker leaves), deadline, device (the engine wants it), disk_full."""

    reason: str
    kill_at: float


@dataclass
class _Attempt:
    database: Database
    settings: Settings
    mine: jobs.Claim
    should_stop: Callable[[], bool]
    turn: RunTurn
    metrics: dict[str, Any] = field(default_factory=dict)
    order: Order = field(default_factory=lambda: Order([], False, None, False))
    stages: Stages = field(init=False)
    store: ArtifactStore = field(init=False)
    offer: Offer | None = None  # of shards of the generation to idle workers
    ended: str | None = None  # how, in one word of a log or trace
    over: bool = False  # the job will not go on: succeeded or cancelled
    pending: list[RunEvent] = field(default_factory=list)
    result: ResultEvent | None = None
    error: ErrorEvent | None = None
    asked: _Asked | None = None
    _renewed: float = field(default_factory=time.monotonic)
    _pulse: jobs.Pulse = field(default_factory=lambda: jobs.Pulse(False, False, None))

    def __post_init__(self) -> None:
        self.stages = Stages(self.mine.fence)

    def run(self) -> None:
        try:
            self.store = open_store(self.settings)
            folder = JobFolder(self.settings.data_dir, self.mine.job_id)
            with folder.lock_file() as lock, ExitStack() as lent:
                if not self._wait_for(lock):
                    return
                work = folder.begin(self.mine.fence)
                status = self._follow(
                    Run(
                        self._prepare(folder, work, lent),
                        folder.path / "run.log",
                        threads=self.settings.run_threads,
                        features=self.settings.features_folder,
                        inherit=[lock, *([] if self.turn.descriptor is None else [self.turn.descriptor])],
                    )
                )
                self._conclude(status, work)
                if self.over:
                    folder.trim()
        except jobs.Superseded:
            raise
        except Problem as problem:
            code, message = problem.code, problem.detail
            self._finish(lambda s: jobs.fail(s, self.mine, code, message))
        except Interrupted:
            self._conclude(None, None)
        except DeviceBusy:
            self._finish(lambda s: jobs.hand_back(s, self.mine, "device_busy"))
        except Exception as error:
            if is_full(error):
                log.warning("job %s attempt %d: the disk is full", self.mine.job_id, self.mine.fence)
                self._crash(DISK_FULL, DISK_FULL_MESSAGE)
                return
            # Its type and place only (service/logs.py): an exception's text may name a file.
            log.exception("job %s attempt %d: the supervisor failed", self.mine.job_id, self.mine.fence)
            self._crash("attempt_failed", f"the attempt failed with {type(error).__name__}")

    def _wait_for(self, lock: int) -> bool:
        """Take the job's lock; False where this attempt ended while an older run still held it."""
        until = time.monotonic() + self.settings.lock_wait_s
        while not try_lock(lock):
            self._beat()
            self._look()
            if self.asked is not None:
                self._conclude(None, None)
                return False
            if time.monotonic() > until:
                self._crash("run_folder_busy", "the run of an earlier attempt is still alive")
                return False
            time.sleep(TICK_S)
        return True

    def _prepare(self, folder: JobFolder, work: Path, lent: ExitStack) -> list[str]:
        with self.database.read() as session:
            sources = sources_of(session, session.get_one(Job, self.mine.job_id))
        at: dict[Artifact, Path] = {}
        for artifact in sources.all():
            check = artifact.kind == ADAPTERS
            held = self._carry(lambda a=artifact, c=check: lent.enter_context(self.store.lent(a, check=c)))  # type: ignore[misc]
            at[artifact] = held.resolve()
        self._take_device(at[sources.data], at.get(sources.evaluation) if sources.evaluation else None)
        with self.database.read() as session:
            job = session.get_one(Job, self.mine.job_id)
            self.order = order_of(session, self.settings, job, folder.path, work, sources, at)
        self.metrics, self.stages.seconds = dict(job.metrics), dict(job.stage_seconds)
        batch_size = job.config.get("preference", {}).get("batch_size")
        if self.settings.share_generation and not self.order.evaluates and isinstance(batch_size, int):
            self.offer = Offer(batch_size, self.settings.share_worth)
        return self.order.command

    def _take_device(self, data: Path, evaluation: Path | None) -> None:
        """Wait for the engine to leave, or look whether there is room beside it. Raises DeviceBusy, Interrupted, Problem."""
        until = time.monotonic() + self.settings.device_wait_s
        while self.turn.must_wait():
            if self._tend():
                raise Interrupted
            if time.monotonic() > until:
                raise DeviceBusy
            time.sleep(TICK_S)
        with self.database.read() as session:
            job = session.get_one(Job, self.mine.job_id)
        if devices.is_accelerator(self.settings) and self.turn.must_fit():
            evaluates = job.kind == KIND
            check_fits(self.settings, data, evaluation, job.config, evaluates=evaluates, tend=self._tend)

    def _follow(self, run: Run) -> int:
        """Relay the run's events until it has ended; its exit status."""
        try:
            while (status := run.ended()) is None:
                self._take(run.poll())
                self._beat()
                self._look()
                if self.asked is not None:
                    if self.asked.kill_at == 0:
                        self.asked.kill_at = time.monotonic() + self.settings.stop_grace_s
                        run.terminate()
                    elif time.monotonic() > self.asked.kill_at:
                        run.kill()
                time.sleep(TICK_S)
            self._take(run.drain())
            return status
        finally:
            run.close()

    def _look(self) -> None:
        """Is there a reason to stop?"""
        if self.asked is None:
            if self._pulse.cancel_requested:
                self.asked = _Asked("cancel", 0)
            elif self._pulse.deadline_at is not None and now() > self._pulse.deadline_at:
                self.asked = _Asked("deadline", 0)
            elif self._pulse.pause_requested:
                self.asked = _Asked("pause", 0)
            elif self.should_stop():
                self.asked = _Asked("stop", 0)
            elif self.turn.must_go():
                self.asked = _Asked("device", 0)
            elif not has_room(self.settings):
                self.asked = _Asked(DISK_FULL, 0)

    def _take(self, events: list[RunEvent]) -> None:
        for event in events:
            if self.offer is not None:
                self.offer.take(event)
            if isinstance(event, ResultEvent):
                self.result = event  # the terminal event tells of it, once it is published
            elif isinstance(event, ErrorEvent):
                self.error = event
                self.pending.append(event)
            elif isinstance(event, ProgressEvent) and self.pending and self._same_progress(self.pending[-1], event):
                self.pending[-1] = event
            else:
                if isinstance(event, MetricsEvent):
                    self.metrics[event.stage] = {"step": event.step, **event.values}
                if isinstance(event, StageEvent):
                    self.stages.take(event)
                self.pending.append(event)

    @staticmethod
    def _same_progress(last: RunEvent, event: ProgressEvent) -> bool:
        """A newer progress of the same stage replaces one that was not stored yet."""
        return isinstance(last, ProgressEvent) and last.stage == event.stage

    def _beat(self) -> None:
        """Renew the lease and store what is pending: soon where there are events, else three times a lease. Raises Superseded."""
        since = time.monotonic() - self._renewed
        if since < (0.5 if self.pending else min(1.0, self.settings.lease_s / 3)):
            return
        try:
            with self.database.write() as session:
                self._pulse = self._store(session)
        except DBAPIError:
            if since > self.settings.lease_s:
                log.error("job %s: the database did not answer for a whole lease", self.mine.job_id)
                raise jobs.Superseded(self.mine.job_id) from None
            time.sleep(0.5)
            return
        self.pending.clear()
        self._renewed = time.monotonic()
        if self.offer is not None and self.offer.parts:
            self.offer = None  # made

    def _store(self, session: Session) -> jobs.Pulse:
        stages = [
            e.stage for e in self.pending if isinstance(e, (StageEvent, ProgressEvent, CheckpointEvent, MetricsEvent))
        ]
        shown = [e for e in self.pending if isinstance(e, ProgressEvent)]
        self.stages.book()
        pulse = jobs.heartbeat(
            session,
            self.mine,
            self.settings.lease_s,
            self.pending,
            stage=stages[-1] if stages else None,
            progress=shown[-1].model_dump(include={"stage", "done", "total", "rate", "eta_s"}) if shown else None,
            metrics=self.metrics if any(isinstance(e, MetricsEvent) for e in self.pending) else None,
            stage_seconds=self.stages.seconds or None,
        )
        if self.offer is not None and self.offer.parts:
            shards.offer(session, self.mine.job_id, self.offer.parts, self.offer.bounds)
        return pulse

    def _conclude(self, status: int | None, work: Path | None) -> None:
        """End this attempt in exactly one way, by what was asked and how the run ended."""
        asked = self.asked.reason if self.asked else None
        self.stages.close()
        self.ended = asked or ("done" if status == DONE else f"status_{status}")
        log.info("job %s attempt %d: run ended with %s, asked: %s", self.mine.job_id, self.mine.fence, status, asked)
        if asked == "cancel":
            self._finish(lambda s: jobs.cancelled(s, self.mine))
            self.over = True
        elif status == DONE and self.result is not None and work is not None:
            self._publish(work, self.result)
        elif asked == "deadline":
            self._finish(lambda s: jobs.fail(s, self.mine, **jobs.DEADLINE))
        elif asked == DISK_FULL or (status == BAD_INPUT and self.error and self.error.code == DISK_FULL):
            self._crash(DISK_FULL, DISK_FULL_MESSAGE)
        elif status == BAD_INPUT:
            error = self.error or ErrorEvent(code="bad_input", message="the run refused its input")
            self._finish(lambda s: jobs.fail(s, self.mine, error.code, error.message))
        elif status == STOPPED and self.order.for_review and self.stages.generated:
            self._finish(lambda s: jobs.await_review(s, self.mine))
        elif asked in _HANDED_BACK:
            self._finish(lambda s: jobs.hand_back(s, self.mine, _HANDED_BACK[asked]))
        elif status == DONE:
            self._crash("no_result", "the run ended without a result")
        else:
            how = f"signal {-status}" if status is not None and status < 0 else f"exit code {status}"
            self._crash(self.error.code if self.error else "run_crashed", f"the run ended with {how}")

    def _publish(self, work: Path, result: ResultEvent) -> None:
        """Artifacts first, whole and under their digests; then one transaction makes them known."""
        if (result.adapter is None) != self.order.evaluates:
            self._crash("no_result", "the run ended with another result than was asked for")
            return
        self._store_now([StageEvent(stage="publishing", status="started")])
        with ExitStack() as held:
            self._carry(lambda: held.enter_context(artifacts_held(self.settings.data_dir, self.database)))
            try:
                made = store_made(self.store, work, result, self._carry)
            except AdapterDamaged:
                self._crash("adapter_damaged", "the adapter's files are not what its manifest says")
                return
            if not self.order.evaluates:
                made |= learnt(work, self.order.review)
            publish: Callable[..., Any] = gates.publish if self.order.evaluates else promotion.publish
            self._finish(lambda s: publish(s, self.mine, metrics=self.metrics, **made))
        self.over = True
        log.info("job %s: published", self.mine.job_id)

    def _carry(self, work: Callable[[], Result]) -> Result:
        """Work of the store's, with a lease that goes on; tried again for a while where the store is away. Raises Problem, Interrupted."""
        return carry(work, self._tend, wait_s=self.settings.artifacts_wait_s, grace_s=self.settings.stop_grace_s)

    def _tend(self) -> bool:
        """Keep the attempt alive during other work; whether something asks it to stop."""
        self._beat()
        self._look()
        return self.asked is not None

    def _crash(self, code: str, message: str) -> None:
        self._finish(
            lambda s: jobs.crash(s, self.mine.job_id, self.mine.fence, code, message, self.settings.max_crashes)
        )

    def _store_now(self, events: list[RunEvent]) -> None:
        self.pending += events
        self._renewed = 0.0
        self._beat()

    def _finish(self, write: Callable[[Session], Any]) -> None:
        """The last write of this attempt, with whatever events are still pending; tried again while the lease lasts."""
        until = time.monotonic() + self.settings.lease_s
        while True:
            try:
                with self.database.write() as session:
                    if self.pending:
                        self._store(session)
                    write(session)
                self.pending.clear()
                return
            except DBAPIError:
                if time.monotonic() > until:
                    raise jobs.Superseded(self.mine.job_id) from None
                time.sleep(0.5)
