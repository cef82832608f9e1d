"""A whole service as processes that can be killed, stopped and flushed one by one: Valkey, two workers, sweep and API on one database."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import redis
from sqlalchemy import select

from service.db import Database
from service.models import Job
from service.settings import Settings
from service.up import _free_port, valkey_binary
from tests.conftest import STAND_IN, wait_for
from tests.worker.test_celery import ROOT, WORKER

WORKERS = ("worker-a", "worker-b")
PARTS = ("valkey", *WORKERS, "sweep", "api")


class Rig:
    """Each part is started again at once when it was killed, as a supervisor of services would do. `faults` counts them by stage."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.log, self.settings, self.database = log, settings, Database(settings.database)
        self.valkey_port, self.api_port = _free_port(), _free_port()
        self.faults: Counter[tuple[str, str]] = Counter()
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = dict(os.environ) | {
            "DATABASE_URL": settings.database,
            "REDIS_URL": f"redis://127.0.0.1:{self.valkey_port}/0",
            "HSCR_DATA_DIR": str(settings.data_dir),
            "HSCR_RUN_COMMAND": f"{sys.executable} {STAND_IN}",
            "HSCR_ENGINE": "none",
            "HSCR_PORT": str(self.api_port),
            "HSCR_LEASE_S": "1.5",
            "HSCR_STOP_GRACE_S": "1",
            "HSCR_RING_AFTER_S": "0.3",
            "HSCR_SWEEP_INTERVAL_S": "0.1",
            "HSCR_MAX_CRASHES": "1000",
        }
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=10)
        for part in PARTS:
            self.start(part)

    def start(self, part: str) -> None:
        command = {
            "valkey": [valkey_binary(), "--bind", "127.0.0.1", "--port", str(self.valkey_port), "--save", ""],
            "sweep": [sys.executable, "-m", "worker.sweep"],
            "api": [sys.executable, "-m", "service.serve"],
        }.get(part, [*WORKER, "-n", f"{part}@here"])
        with self.log.open("ab") as log:
            self._parts[part] = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def kill(self, part: str) -> None:
        self._note(f"kill {part}")
        self._parts[part].kill()
        self._parts[part].wait()
        self.start(part)

    def kill_below(self, generation: int) -> None:
        """kill -9 of the supervisor (1, Celery's child) or of what it runs (2)."""
        level = [psutil.Process(self._parts[part].pid) for part in WORKERS]
        for _ in range(generation):
            level = [child for process in level for child in _children(process)]
        self._note("kill run" if generation == 2 else "kill supervisor")
        for process in level:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def freeze(self, part: str, seconds: float) -> None:
        """STOP, then CONT: the part was dead to the others, and does not know it."""
        self._note(f"freeze {part}")
        family = [psutil.Process(self._parts[part].pid)]
        family += _children(family[0]) if part in WORKERS else []
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(seconds if number == signal.SIGSTOP else 0)

    def flush(self) -> None:
        self._note("flush valkey")
        with contextlib.suppress(redis.RedisError):
            redis.Redis(port=self.valkey_port, socket_timeout=2).flushall()

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/healthz").status_code == 200
        return False

    def wait_ready(self) -> None:
        wait_for(self.ready, 30, "the API answers")

    def close(self) -> None:
        for process in self._parts.values():
            family = [process, *_children(psutil.Process(process.pid))] if process.poll() is None else []
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
        self.http.close()
        self.database.close()

    def _note(self, fault: str) -> None:
        """Count the fault under the stage in which the jobs are that run now."""
        with self.database.read() as session:
            stages = session.scalars(select(Job.stage).where(Job.status == "running")).all()
        for stage in stages or ["no job runs"]:
            self.faults[fault, stage or "starting"] += 1


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=False) if process.pid else []
    return []
