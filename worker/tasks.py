"""The Celery binding and nothing else: a bell comes in with a job's id, worker/supervise.py does the work, or worker/help.py where the bell
calls for help with a job that runs.

`celery -A worker.tasks worker` runs it. On SIGTERM Celery's main process waits for its child's task to end; a byte of shared memory tells
the child to hand its job back now.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
from collections.abc import Callable
from typing import Any

from celery.signals import setup_logging, worker_process_init, worker_shutting_down

from service import logs, tracing
from service.db import Database
from service.lifeline import die_with_parent, watch_parent
from service.queue import HELP_TASK, QUEUE, TASK, make_celery
from service.settings import Settings
from worker import help as helping
from worker import supervise

settings = Settings()
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
    signal.signal(signal.SIGTERM, lambda *_: _child.update(told=True))  # from here on there may be a job to hand back
    database = Database(settings.database)
    try:
        work(database, settings, job_id, should_stop=lambda: _shutdown[0] != 0 or leaving())
    finally:
        database.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if (
            leaving()
        ):  # nobody waits for this child any more, or it was told to go; the message was acknowledged on receipt
            os._exit(0)


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """Celery configures no logging of its own where somebody listens here."""


@worker_shutting_down.connect
def _tell_child(**_: Any) -> None:
    _shutdown[0] = 1


@worker_process_init.connect
def _prepare_child(**_: Any) -> None:
    # While it waits the kernel ends it. A handler of Python's runs between two steps of the interpreter, so one that came just before the
    # wait for the next bell would come to nothing, and the child outlive its parent.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tracing.start("worker", settings.trace, threads=False)
    die_with_parent(os.getppid(), signal.SIGTERM)  # TERM, not KILL: there may be a job to hand back
