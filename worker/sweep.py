"""The sweep: its own small process that rings the bells of new jobs, rings again for forgotten ones, takes jobs and shards back from the
dead, calls helpers, and removes what is no longer kept. A thread of it sends webhooks.

`python -m worker.sweep`. Everything it does may be done twice, so a second sweep is harmless. No torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import DBAPIError

from service import jobs, logs, retention, shards
from service.db import Database, now
from service.errors import Problem
from service.lifeline import watch_parent
from service.models import Job, Outbox
from service.queue import call_helper, make_celery, ring, waiting_bells
from service.settings import Settings, settings_or_exit
from worker import webhooks

log = logging.getLogger("hscr.sweep")
BATCH, AT_ONCE = 100, 4


def relay(database: Database, celery: Celery) -> int:
    """Ring the bells that wait in the outbox; how many. Rung first, removed after: a crash between the two rings twice."""
    with database.read() as session:
        bells = session.execute(select(Outbox.id, Outbox.job_id).order_by(Outbox.id).limit(BATCH)).all()
    for bell in bells:
        ring(celery, bell.job_id)
        with database.write() as session:
            session.execute(update(Job).where(Job.id == bell.job_id).values(rung_at=now()))
            session.execute(delete(Outbox).where(Outbox.id == bell.id))
    return len(bells)


def ring_again(database: Database, celery: Celery, after_s: float) -> int:
    """Ring for queued jobs that nobody claimed though their bell was rung, once no bell is left in the broker; how many.

    While bells wait there, a worker will come for them: ringing more would only fill the broker behind a busy worker.
    """
    forgotten = or_(
        Job.rung_at < now() - timedelta(seconds=after_s), Job.rung_at.is_(None) & ~Job.id.in_(select(Outbox.job_id))
    )
    with database.read() as session:
        ids = session.scalars(
            select(Job.id).where(Job.status == "queued", forgotten).order_by(Job.queued_at).limit(BATCH)
        ).all()
    if not ids or waiting_bells(celery) > 0:
        return 0
    for job_id in ids:
        ring(celery, job_id)
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(rung_at=now()))
    return len(ids)


def reap(database: Database, max_crashes: int) -> int:
    """Queue again (or fail) the jobs whose lease ran out, and fail those that still waited at their deadline; how many."""
    with database.read() as session:
        lost = session.scalars(
            select(Job.id).where(Job.status == "running", Job.lease_until < now()).limit(BATCH)
        ).all()
        waiting = Job.status.in_(jobs.WAITING)
        late = session.scalars(select(Job.id).where(waiting, Job.deadline_at < now()).limit(BATCH)).all()
    for job_id in lost:
        with database.write() as session:
            status = jobs.reap(session, job_id, max_crashes)
        log.warning("job %s: lease ran out, now %s", job_id, status)
    for job_id in late:
        with database.write() as session:
            jobs.expire(session, job_id)
    return len(lost) + len(late)


def reap_shards(database: Database, max_crashes: int) -> int:
    """Take back the shards of helpers that died; how many."""
    with database.read() as session:
        lost = shards.lost(session)
    for claim in lost:
        with database.write() as session:
            status = shards.reap(session, claim, max_crashes)
        log.warning("job %s: the lease of shard %d ran out, now %s", claim.job_id, claim.number, status)
    return len(lost)


def call_helpers(database: Database, celery: Celery, settings: Settings) -> int:
    """Ring for idle workers where a running job has shards to make and no bell waits in the broker; how often.

    A bell that stays there says that nobody is idle. At most AT_ONCE a round: who comes goes on by himself.
    """
    if not settings.share_generation:
        return 0
    with database.read() as session:
        wanted = shards.wanted(session, settings.key_running_max)[:AT_ONCE]
    if not wanted or waiting_bells(celery) > 0:
        return 0
    for job_id in wanted:
        call_helper(celery, job_id)
    return len(wanted)


def sweep_once(database: Database, celery: Celery, settings: Settings, *, clean: bool = False) -> None:
    """One round, with `clean` a thorough one.

    What fails is logged by its kind and tried again in the next round; one step's failure does not stop the others.
    """
    steps: list[Callable[[], int]] = [
        lambda: reap(database, settings.max_crashes),
        lambda: relay(database, celery),
        lambda: ring_again(database, celery, settings.ring_after_s),
        lambda: reap_shards(database, settings.max_crashes),
        lambda: call_helpers(database, celery, settings),
    ]
    if clean:
        steps.append(lambda: retention.clean(database, settings))
    for step in steps:
        try:
            step()
        except (BrokerError, RedisError, OSError) as error:
            log.warning("the broker or the disk does not answer: %s", type(error).__name__)
        except Problem as problem:
            log.warning("%s", problem.code)  # the artifact store is away
        except DBAPIError as error:
            log.warning("the database does not answer: %s", type(error).__name__)


def heartbeat_file(settings: Settings) -> Path:
    return settings.data_dir / "sweep.alive"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--healthy", action="store_true", help="exit 0 where a sweep ran within the last minute")
    arguments = parser.parse_args()
    settings = settings_or_exit()
    alive = heartbeat_file(settings)
    if arguments.healthy:
        return 0 if alive.is_file() and time.time() - alive.stat().st_mtime < 60 else 1
    watch_parent()
    logs.configure("sweep", settings.log)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database, celery = Database(settings.database), make_celery(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    log.info("sweep %d started", os.getpid())
    if settings.webhook_hosts:
        webhooks.start(database, settings, stop)
    cleaned = 0.0
    while not stop.is_set():
        due = time.monotonic() - cleaned > settings.clean_interval_s
        sweep_once(database, celery, settings, clean=due)
        cleaned = time.monotonic() if due else cleaned
        try:
            alive.touch()
        except OSError as error:  # a full disk, say: then the health check speaks, and the sweep goes on
            log.warning("the heartbeat file cannot be written: %s", type(error).__name__)
        stop.wait(settings.sweep_interval_s)
    database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
