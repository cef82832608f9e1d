"""The Celery binding and nothing else: a bell comes in with a job's id, worker/supervise.py does the work, or worker/help.py where the bell
calls for help with a job that runs.

`celery -A worker.tasks worker` runs it. On SIGTERM Celery's main process waits for its child's task to end; a byte of shared memory tells
the child to hand its job back now.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import signal
from collections.abc import Callable
from contextlib import closing
from typing import Any

from celery.signals import setup_logging, worker_process_init, worker_shutting_down

from service import logs, tracing
from service.db import Database
from service.lifeline import die_with_parent, watch_parent
from service.queue import HELP_TASK, QUEUE, TASK, make_celery
from service.settings import settings_or_exit
from worker import help as helping
from worker import supervise

log = logging.getLogger("hscr.worker")
settings = settings_or_exit()
logs.configure("worker", settings.log)
app = make_celery(settings)
_JOB_ID = re.compile(r"^job_[0-9a-f]{28}$")
_shutdown = mmap.mmap(-1, 1)  # written by the main process, seen by its forked child
_child = {"told": False}  # the child itself got SIGTERM

watch_parent()


@app.task(name=TASK, queue=QUEUE, ignore_result=True)
def align(job_id: Any) -> None:
    _answer(job_id, supervise.run_job)


@app.task(name=HELP_TASK, queue=QUEUE, ignore_result=True)
def help_align(job_id: Any) -> None:
    _answer(job_id, helping.help_job)


def _answer(job_id: Any, work: Callable[..., None]) -> None:
    if not (isinstance(job_id, str) and _JOB_ID.match(job_id)):
        return  # a forged bell
    parent = os.getppid()
    leaving = lambda: _child["told"] or os.getppid() != parent  # noqa: E731
    before = signal.signal(signal.SIGTERM, lambda *_: _child.update(told=True))
    die_with_parent(parent, signal.SIGTERM)  # TERM, not KILL: from here on there may be a job to hand back
    try:
        with closing(Database(settings.database)) as database:
            work(database, settings, job_id, should_stop=lambda: _shutdown[0] != 0 or leaving())
    except Exception as error:
        log.error("job %s: its bell was not answered: %s", job_id, type(error).__name__)  # its text may name a file
        raise
    finally:
        # Nobody waits for this child any more, or it was told to go; the message was acknowledged on receipt.
        if leaving():
            os._exit(0)
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, before)


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """Celery configures no logging of its own where somebody listens here."""


@worker_shutting_down.connect
def _tell_child(**_: Any) -> None:
    _shutdown[0] = 1


@worker_process_init.connect
def _prepare_child(**_: Any) -> None:
    tracing.start("worker", settings.trace, threads=False)
    # KILL while it waits: Python's handler of a TERM that came just before the wait for the next bell would run behind it, so never.
    die_with_parent(os.getppid())
