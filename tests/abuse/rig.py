"""A whole service as real processes for attacks on it: API (an engine that echoes), Celery worker, sweep and Valkey; what it stores, writes
and how much memory it holds. One for all tests of the folder: an attack must leave it as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
from sqlalchemy import func, select

from service.db import Database, upgrade
from service.lifeline import PARENT_VARIABLE
from service.models import Base
from service.up import _free_port
from tests.conftest import STAND_IN, wait_for

ROOT = Path(__file__).parents[2]
WORKER = ["celery", "-q", "-A", "worker.tasks", "worker", "--loglevel=INFO", "--concurrency=1"]
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
DECODER_MB = 600  # of addresses
CONNECTIONS = 150  # open at once


class Rig:
    def __init__(self, folder: Path, valkey: str) -> None:
        self.data, self.port, self.valkey = folder / "data", _free_port(), valkey
        self.told, self.logs = folder / "stand_in.json", folder / "logs"
        self.logs.mkdir()
        self.tell()
        self.hook = _free_port()  # nobody listens there unless a test does
        self.collector = Collector()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HSCR_", "DATABASE_", "REDIS_"))}
        url = f"sqlite:///{self.data / 'hscr.db'}"
        self.environment = environment | {
            "HSCR_DATA_DIR": str(self.data),
            "DATABASE_URL": url,
            "REDIS_URL": valkey,
            "HSCR_PORT": str(self.port),
            "HSCR_RUN_COMMAND": f"{sys.executable} {STAND_IN}",
            "HSCR_DECODE_MEMORY_MAX_BYTES": str(DECODER_MB * 2**20),
            "HSCR_BODY_PAUSE_MAX_S": "1",
            "HSCR_BODY_MAX_S": "15",
            "HSCR_HEAD_MAX_S": "1.5",
            "HSCR_CONNECTIONS_MAX": str(CONNECTIONS),
            "HSCR_UPLOAD_MAX_BYTES": str(200 * 2**20),
            "HSCR_SWEEP_INTERVAL_S": "0.2",
            "HSCR_RING_AFTER_S": "0.5",
            "HSCR_LEASE_S": "10",
            "HSCR_WEBHOOK_HOSTS": f"http://127.0.0.1:{self.hook}",
            "HSCR_WEBHOOK_SECRET": "whsec_" + "A" * 32,
            "HSCR_WEBHOOK_TIMEOUT_S": "2",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "STAND_IN": str(self.told),
            PARENT_VARIABLE: str(os.getpid()),  # they die with the tests, however those end
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        upgrade(url)
        self.database = Database(url)
        self.api = self._start("api", "tests.abuse.server")
        self.started = [self.api]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        try:
            wait_for(self._ready, 180, "the service is ready")
        except BaseException:
            self.close()
            raise

    def start_workers(self) -> None:
        """From here on jobs run: most attacks need none."""
        self.started += [self._start("worker", *WORKER), self._start("sweep", "worker.sweep")]

    def tell(self, **values: Any) -> None:
        """What the stand-in run does."""
        self.told.write_text(json.dumps({"steps": 2} | values))

    def log(self) -> str:
        """All that the processes have written."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.logs.iterdir()))

    def broker(self) -> bytes:
        """Every key and value in the broker."""
        with redis.Redis.from_url(self.valkey) as client:
            return b"".join(key + client.dump(key) for key in client.scan_iter("*") if client.exists(key))

    def stored(self) -> dict[str, int]:
        """Rows by table, and files of data sets, adapters and uploads."""
        with self.database.read() as session:
            rows = {
                t.name: session.scalar(select(func.count()).select_from(t)) or 0 for t in Base.metadata.sorted_tables
            }
        places = ("datasets", "artifacts", "tmp", "runs")
        files = sum(p.is_file() for place in places for p in (self.data / place).rglob("*") if p.name != ".lock")
        return rows | {"files": files}

    @contextmanager
    def bounded(self, api_mb: float = 160.0) -> Iterator[None]:
        """Resident memory, asserted by the kernel's own high-water marks: the API may grow by so much within the block, each decoder up to
        its limit; and the API must still answer.
        """
        before = _reset(self.api.pid)
        yield
        grown = _high_water(self.api.pid) - before
        assert grown <= api_mb, f"the API grew by {grown:.0f} MB"
        for process in psutil.Process(self.api.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                assert _high_water(process.pid) <= DECODER_MB
        assert self.http.get("/healthz").status_code == 200

    def close(self) -> None:
        self.http.close()
        self.database.close()
        for process in self.started:
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
        self.collector.close()

    def _start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.logs / name).open("ab") as out:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _ready(self) -> bool:
        assert self.api.poll() is None, self.log()
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False


class Collector:
    """What the processes tell of themselves as OpenTelemetry traces: the protobuf as it came, in which texts stand as they are."""

    def __init__(self) -> None:
        heard = self.heard = list[bytes]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Ear:
    """A socket that notes whether anybody connects: the canary of address fetching."""

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port, self.heard = self._socket.getsockname()[1], 0
        self._over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over:
                connection, _ = self._socket.accept()
                self.heard += not self._over
                connection.close()

    def close(self) -> None:
        self._over = True
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            pass
        self._socket.close()


def _reset(pid: int) -> float:
    """Begin a new high-water mark; the resident memory now, in MB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _high_water(pid)


def _high_water(pid: int) -> float:
    """In MB, since `_reset`: the kernel's own count, so that no peak is missed between two looks."""
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def raw(port: int, *parts: bytes, within_s: float = 20.0, pause_s: float = 0.0) -> bytes:
    """What the server says to these bytes until it closes or has answered; empty where it closed without a word."""
    with socket.create_connection(("127.0.0.1", port), within_s) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            while chunk := connection.recv(65536):
                answer += chunk
        except (ConnectionError, TimeoutError):
            pass
        return answer
