"""A whole service as processes that can be killed, stopped, cut off and starved one by one: PostgreSQL or SQLite, Valkey, two workers,
sweep and API on one data folder, with a fault proxy (tests/chaos/proxy.py) between each of them and each server.
"""

from __future__ import annotations

import contextlib
import json
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

from service.db import Database
from service.settings import Settings
from service.up import _free_port, valkey_binary
from tests.chaos.children import started
from tests.chaos.points import POINTS
from tests.chaos.postgres import Postgres
from tests.chaos.proxy import Proxy
from tests.conftest import wait_for
from tests.small_disk import SmallDisk
from tests.worker.test_celery import ROOT, WORKER

WORKERS = ("worker-a", "worker-b")
CLIENTS = (*WORKERS, "sweep", "api")
# The long one says nothing for longer than a claim takes: what would write in a removed folder would end before the next run begins.
SHORT, LONG = {"steps": 12, "step_s": 0.05}, {"steps": 3, "step_s": 1.5}
SHARED = {"steps": 3, "step_s": 0.05, "record_s": 0.2}


class Rig:
    """Each part is started again at once when it was killed, as a supervisor of services would do. `faults` counts them by write point."""

    def __init__(
        self,
        settings: Settings,
        scratch: Path,
        postgres: Postgres | None,
        disk: SmallDisk | None,
        real: dict[str, str],
        real_pid: int,
    ) -> None:
        """`real`: the environment that leads runs to the process `real_pid`, which forks the real ones."""
        self.real_pid = real_pid
        self.settings, self.postgres, self.disk, self.log = settings, postgres, disk, scratch / "processes.log"
        self.database = Database(settings.database)
        self.parts = ("valkey", *CLIENTS) if postgres is None else ("valkey", *CLIENTS, "postgres")
        self.valkey_port, self.api_port = _free_port(), _free_port()
        self.faults: Counter[tuple[str, str]] = Counter()
        self.proxy = Proxy()
        self._points, self.witness = scratch / "points", scratch / "witness"
        for folder in (self._points, self.witness):
            folder.mkdir()
        for name, told in (("short", SHORT), ("long", LONG), ("shared", SHARED)):
            (scratch / f"{name}.json").write_text(json.dumps(told))
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = dict(os.environ) | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HSCR_DATA_DIR": str(settings.data_dir),
            "HSCR_RUN_COMMAND": f"{sys.executable} -m tests.chaos.run",
            "HSCR_GENERATE_COMMAND": f"{sys.executable} -m tests.chaos.run --generate",
            "HSCR_SHARE_WORTH": "0.3",  # a start takes as long as the generation here
            "HSCR_ENGINE": "none",
            "HSCR_FEATURE_CACHE": "off",
            "HSCR_PORT": str(self.api_port),
            "HSCR_LEASE_S": "1.5",
            "HSCR_STOP_GRACE_S": "1",
            "HSCR_RING_AFTER_S": "0.3",
            "HSCR_SWEEP_INTERVAL_S": "0.1",
            "HSCR_MAX_CRASHES": "1000",
            "HSCR_DISK_RESERVE_BYTES": str(settings.disk_reserve_bytes),
            "CHAOS_POINTS": str(self._points),
            "CHAOS_WITNESS": str(self.witness),
            "CHAOS_SHORT": str(scratch / "short.json"),
            "CHAOS_LONG": str(scratch / "long.json"),
            "CHAOS_SHARED": str(scratch / "shared.json"),
            **real,
        }
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=10)
        self._links = {client: self._environment_of(client) for client in CLIENTS}
        for part in self.parts:
            if part != "postgres":
                self.start(part)

    def _environment_of(self, client: str) -> dict[str, str]:
        """Where this part finds its servers: each behind a link of its own."""
        url = self.settings.database
        if self.postgres is not None:
            url = self.postgres.url(self.proxy.link(client, "postgres", self.postgres.port))
        valkey = self.proxy.link(client, "valkey", self.valkey_port) if client != "api" else self.valkey_port
        return {"DATABASE_URL": url, "REDIS_URL": f"redis://127.0.0.1:{valkey}/0"}

    def start(self, part: str) -> None:
        if part == "postgres":
            assert self.postgres is not None
            self.postgres.start()
            return
        command = {
            "valkey": [valkey_binary(), "--bind", "127.0.0.1", "--port", str(self.valkey_port), "--save", ""],
            "sweep": [sys.executable, "-m", "worker.sweep"],
            "api": [sys.executable, "-m", "service.serve"],
        }.get(part, [*(w if w != "worker.tasks" else "tests.chaos.watched" for w in WORKER), "-n", f"{part}@here"])
        self._parts[part] = started(command, self.log, cwd=ROOT, env=self._environment | self._links.get(part, {}))

    def keep(self) -> None:
        """Start again whatever has ended by itself, as the broker without a disk or a sweep without a database may."""
        for part, process in self._parts.items():
            if process.poll() is not None:
                self.faults[f"{part} ended by itself", "-"] += 1
                self.start(part)

    def kill(self, part: str) -> None:
        self.note(f"kill {part}")
        if part == "postgres":
            assert self.postgres is not None
            self.postgres.kill()
        else:
            self._parts[part].kill()
            self._parts[part].wait()
        self.start(part)

    def kill_below(self, generation: int) -> None:
        """kill -9 of the supervisor (1, Celery's child) or of what it runs (2)."""
        self.note("kill run" if generation == 2 else "kill supervisor")
        for process in self._below(generation):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def freeze(self, part: str, seconds: float) -> None:
        """STOP, then CONT: the part was dead to the others, and does not know it. Of a worker its supervisor too, but not the run."""
        self.note(f"freeze {part}")
        if part == "postgres":
            assert self.postgres is not None
            family = self.postgres.family()
        elif part == "runs":
            family = self._below(2)
        else:
            family = [psutil.Process(self._parts[part].pid)]
            family += _children(family[0]) if part in WORKERS else []
        _hold(family, seconds)

    def freeze_supervisors(self, pids: list[int], seconds: float) -> None:
        """STOP, then CONT, of supervisors alone: their runs stay awake, and may outlive their leases."""
        self.note("freeze supervisor")
        family = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.append(psutil.Process(pid))
        _hold(family, seconds)

    def spoil(self, which: int, mode: str, seconds: float) -> None:
        """Make the network between one part and one server bad for a while, beginning now."""
        name = sorted(self.proxy.links)[which % len(self.proxy.links)]
        self.note(f"{mode} {name[0]}-{name[1]}")
        self.proxy.spoil(name, mode, seconds)

    def flush(self) -> None:
        self.note("flush valkey")
        with contextlib.suppress(redis.RedisError):
            redis.Redis(port=self.valkey_port, socket_timeout=2).flushall()

    def fill_disk(self, seconds: float) -> None:
        assert self.disk is not None
        self.note("full disk")
        with self.disk.full() as fill:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                fill()
                time.sleep(0.05)

    def await_point(self, point: str, seconds: float) -> list[int]:
        """Wait until some supervisor stands at this write point: the process ids of those that do."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := [pid for pid, where in self.supervisors().items() if where == point]:
                return found
            time.sleep(0.005)
        return []

    def await_helper(self, seconds: float) -> list[psutil.Process]:
        """Wait until a worker helps with another one's job: the helper's run, its supervisor, and Celery's main process."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for process in self._below(2):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "--generate" in process.cmdline():
                        return [process, *process.parents()[:2]]
            time.sleep(0.02)
        return []

    def lose(self, family: list[psutil.Process], how: str) -> None:
        """kill -9 of a helper's run or supervisor, or STOP of both, then CONT, past a lease."""
        self.note(f"{how} of a helper")
        if how.startswith("kill"):
            with contextlib.suppress(psutil.NoSuchProcess):
                family["supervisor" in how].kill()
        else:
            _hold(family[:2] if how == "freeze" else family[1:2], 3.0)

    def supervisors(self) -> dict[int, str]:
        """The living supervisors by process id, each with the write point that it passed last."""
        found = {}
        for path in self._points.iterdir():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                if psutil.Process(int(path.name)).status() != psutil.STATUS_ZOMBIE:
                    found[int(path.name)] = path.read_text()
        return {pid: point for pid, point in found.items() if point in POINTS}

    def note(self, fault: str) -> None:
        """Count the fault under the write points at which the supervisors stand now."""
        for point in list(self.supervisors().values()) or ["no attempt"]:
            self.faults[fault, point] += 1

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/healthz").status_code == 200
        return False

    def wait_ready(self) -> None:
        wait_for(self.ready, 240, "the API answers")  # a busy machine imports slowly

    def close(self) -> None:
        self.http.close()  # first: whatever the killing raises, nothing stays open to be blamed on another test
        self.database.close()
        for process in self._parts.values():
            family = [process, *_children(psutil.Process(process.pid))] if process.poll() is None else []
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
        self.proxy.close()

    def _below(self, generation: int) -> list[psutil.Process]:
        level = [psutil.Process(self._parts[part].pid) for part in WORKERS]
        for _ in range(generation):
            level = [child for process in level for child in _children(process)]
        return level


def table(faults: Counter[tuple[str, str]]) -> str:
    """Faults by the write point after which they fell, and by kind."""
    rows = []
    for point in (*POINTS, "no attempt", "-"):
        here = {fault: n for (fault, where), n in faults.items() if where == point}
        if here:
            kinds = ", ".join(f"{fault} {n}" for fault, n in sorted(here.items()))
            rows.append(f"  {point:16} {sum(here.values()):4}  {kinds}")
    return "\n".join(rows)


def _hold(family: list[psutil.Process], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        time.sleep(seconds if number == signal.SIGSTOP else 0)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=False) if process.pid else []
    return []
